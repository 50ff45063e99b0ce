/* floor PID [MS]: the least that a snapshot of all threads costs on Linux without privileges.
 *
 * Descriptors of every thread's schedstat are opened once; a snapshot is one fstat of task/ to see that
 * no thread was created or ended, one pread per thread, and the process's stat and statm. For each line on stdin it
 * takes one and prints the CPU time it took, ns; with MS it takes one every MS milliseconds until it is killed. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

static long long cpu_ns(void)
{
    struct timespec now;
    clock_gettime(CLOCK_PROCESS_CPUTIME_ID, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static long long number(const char *text)
{
    long long value = 0;
    while (*text >= '0' && *text <= '9')
        value = value * 10 + *text++ - '0';
    return value;
}

int main(int count, char **words)
{
    if (count != 2 && count != 3)
        return 2;
    struct rlimit limit;
    getrlimit(RLIMIT_NOFILE, &limit);
    limit.rlim_cur = limit.rlim_max;
    setrlimit(RLIMIT_NOFILE, &limit);
    char path[300], line[64], content[1024];
    snprintf(path, sizeof path, "/proc/%s/task", words[1]);
    DIR *task = opendir(path);
    if (!task)
        return 1;
    int *files = calloc(100000, sizeof *files), threads = 0;
    long long *times = calloc(100000, sizeof *times);
    for (struct dirent *entry; (entry = readdir(task));)
        if (entry->d_name[0] != '.') {
            snprintf(path, sizeof path, "%s/schedstat", entry->d_name);
            files[threads++] = openat(dirfd(task), path, O_RDONLY);
        }
    snprintf(path, sizeof path, "/proc/%s/stat", words[1]);
    int stat_file = open(path, O_RDONLY);
    snprintf(path, sizeof path, "/proc/%s/statm", words[1]);
    int statm_file = open(path, O_RDONLY);
    long pause_ms = count == 3 ? atol(words[2]) : 0;
    struct timespec pause = {pause_ms / 1000, pause_ms % 1000 * 1000000};
    while (pause_ms ? !nanosleep(&pause, NULL) : fgets(line, sizeof line, stdin) != NULL) {
        long long begin = cpu_ns();
        struct stat links;
        fstat(dirfd(task), &links);
        for (int i = 0; i < threads; i++) {
            ssize_t length = pread(files[i], content, 64, 0);
            if (length > 0)
                times[i] = number(content);
        }
        ssize_t length = pread(stat_file, content, sizeof content, 0);
        length += pread(statm_file, content, sizeof content, 0);
        long long took = cpu_ns() - begin;
        if ((long)links.st_nlink - 2 != threads || length <= 0)
            return 1;
        if (!pause_ms) {
            printf("%lld\n", took);
            fflush(stdout);
        }
    }
    return 0;
}
