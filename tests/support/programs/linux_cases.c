/*
 * Programs that a sampler of Linux reads wrong unless it knows of them: linux_cases CASE [ARGUMENT...]
 *
 *   exec CPU_MS       a second thread uses that much CPU time and, at a line of stdin, executes this file as "idle"
 *   again CPU_MS      the same, but it executes itself with the same arguments and, of the same length, environment
 *   idle              does nothing
 *   worker            the main thread only waits for a busy one
 *   pool N            N sleeping threads, which the main thread renames job-0 ... at a line of stdin
 *   leave             opens 7 descriptors, and the main thread exits while another one sleeps
 *   hidden            is not dumpable
 *   attach PID        stops a process as a debugger does, until end of file on stdin
 *
 * Each prints a line when it is so far.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <fcntl.h>
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/ptrace.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char **arguments;
static double cpu_ms;

static double used_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void say(void) {
    puts("so far");
    fflush(stdout);
}

static void wait_line(void) {
    char byte;
    while (read(0, &byte, 1) == 1 && byte != '\n') {}
}

static void *execute(void *again) {
    char *environment[] = {"STAGE=2", NULL};
    while (used_ms() < cpu_ms) {}
    say();
    wait_line();
    if (again)
        execve("/proc/self/exe", arguments, environment);
    else
        execl("/proc/self/exe", "linux_cases", "idle", (char *)NULL);
    perror("exec");
    exit(1);
}

static void *busy(void *unused) {
    for (volatile int i = 0;; i++) {}
    return unused;
}

static void *sleeping(void *unused) {
    for (;;)
        pause();
    return unused;
}

static pthread_t begin(void *(*body)(void *), void *argument) {
    pthread_t thread;
    if (pthread_create(&thread, NULL, body, argument))
        abort();
    return thread;
}

int main(int count, char **values) {
    const char *what = count > 1 ? values[1] : "idle", *stage = getenv("STAGE");
    int number = count > 2 ? atoi(values[2]) : 0;
    arguments = values;
    if (!strcmp(what, "exec") || !strcmp(what, "again")) {
        if (stage && !strcmp(stage, "2")) {
            say();
            sleeping(NULL);
        }
        cpu_ms = number;
        begin(execute, strcmp(what, "again") ? NULL : values);
        sleeping(NULL);
    } else if (!strcmp(what, "worker")) {
        pthread_t worker = begin(busy, NULL);
        say();
        pthread_join(worker, NULL);
    } else if (!strcmp(what, "pool")) {
        pthread_t *threads = calloc(number, sizeof *threads);
        for (int i = 0; i < number; i++)
            threads[i] = begin(sleeping, NULL);
        say();
        wait_line();
        for (int i = 0; i < number; i++) {
            char name[16];
            snprintf(name, sizeof name, "job-%d", i);
            pthread_setname_np(threads[i], name);
        }
    } else if (!strcmp(what, "leave")) {
        for (int i = 0; i < 7; i++)
            open("/dev/null", O_RDONLY);
        begin(sleeping, NULL);
        say();
        pthread_exit(NULL);
    } else if (!strcmp(what, "hidden")) {
        prctl(PR_SET_DUMPABLE, 0, 0, 0, 0);
    } else if (!strcmp(what, "attach")) {
        char path[64];
        pid_t attached[64];
        int many = 0;
        struct dirent *entry;
        snprintf(path, sizeof path, "/proc/%d/task", number);
        for (DIR *tasks = opendir(path); tasks && (entry = readdir(tasks));) {
            pid_t tid = atoi(entry->d_name);
            if (tid && many < 64) {
                if (ptrace(PTRACE_ATTACH, tid, NULL, NULL) || waitpid(tid, NULL, __WALL) != tid)
                    return 1;
                attached[many++] = tid;
            }
        }
        say();
        while (getchar() != EOF) {}
        while (many)
            ptrace(PTRACE_DETACH, attached[--many], NULL, NULL);
        return 0;
    }
    say();
    sleeping(NULL);
}
