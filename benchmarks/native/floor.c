/* floor PID [MS]: the least that a snapshot of all threads costs on Linux without privileges.
 *
 * Descriptors of every thread's schedstat are opened once; a snapshot is one fstat of task/ to see that
 * no thread was created or ended, one pread per thread for its run time and its wait, and the process's stat and statm.
 * For each line on stdin it takes one and prints the CPU time it took, ns; with MS it takes one every MS milliseconds
 * until it is killed, and once a second also reads the figures of the process and of the machine, as the recorder does. */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
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

/* Read a number, and move on to what follows it. */
static long long number(const char **text)
{
    long long value = 0;
    while (**text == ' ' || **text == '\t')
        ++*text;
    while (**text >= '0' && **text <= '9')
        value = value * 10 + *(*text)++ - '0';
    return value;
}

/* Sum up the numbers that follow these words on their lines of a file; a file that does not exist has none. */
static long long numbers_after(int file, const char *const *words)
{
    static char content[16384];
    ssize_t length = file < 0 ? 0 : pread(file, content, sizeof content - 1, 0);
    content[length > 0 ? length : 0] = 0;
    long long sum = 0;
    for (; *words; words++) {
        const char *found = strstr(content, *words);
        if (found) {
            found += strlen(*words);
            do
                sum += number(&found);
            while (*found == ' ');
        }
    }
    return sum;
}

enum { FIGURES = 9 };
static const char *const figure_paths[FIGURES] = {
    "/proc/%s/stat", "/sys/fs/cgroup/cpu/cpu.stat", "/proc/%s/status", "/proc/stat", "/proc/loadavg", "/proc/meminfo",
    "/proc/pressure/cpu", "/proc/pressure/memory", "/proc/pressure/io",
};
static const char *const figure_words[FIGURES][6] = {
    {") "}, {"throttled_time"}, {"VmHWM:", "RssAnon:", "VmSwap:"}, {"cpu "}, {""}, {"MemAvailable:", "SwapTotal:", "SwapFree:"},
    {"total="}, {"total="}, {"total="},
};

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
    long long(*times)[2] = calloc(100000, sizeof *times);
    for (struct dirent *entry; (entry = readdir(task));)
        if (entry->d_name[0] != '.') {
            snprintf(path, sizeof path, "%s/schedstat", entry->d_name);
            files[threads++] = openat(dirfd(task), path, O_RDONLY);
        }
    snprintf(path, sizeof path, "/proc/%s/stat", words[1]);
    int stat_file = open(path, O_RDONLY);
    snprintf(path, sizeof path, "/proc/%s/statm", words[1]);
    int statm_file = open(path, O_RDONLY);
    int figures[FIGURES];
    for (int i = 0; i < FIGURES; i++) {
        snprintf(path, sizeof path, figure_paths[i], words[1]);
        figures[i] = open(path, O_RDONLY);
    }
    snprintf(path, sizeof path, "/proc/%s/fd", words[1]);
    long pause_ms = count == 3 ? atol(words[2]) : 0;
    struct timespec pause = {pause_ms / 1000, pause_ms % 1000 * 1000000};
    long since_ms = 1000;
    volatile long long sum;
    while (pause_ms ? !nanosleep(&pause, NULL) : fgets(line, sizeof line, stdin) != NULL) {
        long long begin = cpu_ns();
        struct stat links;
        fstat(dirfd(task), &links);
        for (int i = 0; i < threads; i++) {
            ssize_t length = pread(files[i], content, 64, 0);
            if (length > 0) {
                const char *text = content;
                times[i][0] = number(&text);
                times[i][1] = number(&text);
            }
        }
        ssize_t length = pread(stat_file, content, sizeof content, 0);
        length += pread(statm_file, content, sizeof content, 0);
        since_ms += pause_ms;
        if (pause_ms && since_ms >= 1000) {
            since_ms = 0;
            struct stat descriptors;
            sum = stat(path, &descriptors);
            for (int i = 0; i < FIGURES; i++)
                sum += numbers_after(figures[i], figure_words[i]);
        }
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
