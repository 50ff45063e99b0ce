/*
 * Targets of unusual kinds: odd_target KIND
 *
 *   vfork         a child made by vfork sleeps, and the thread that made it waits in the kernel
 *   shared        a child made by clone with CLONE_VM and without CLONE_THREAD uses CPU time in the same memory
 *   short         10000 threads, one after the other, none of which lives for a millisecond
 *   storm         executes itself a thousand times a second, from threads that are not the main one
 *   zombies       50 children that have exited and are not collected
 *   burners COUNT     threads that use CPU time without end, while the main thread sleeps
 *   headless CPU_MS   the main thread exits, another uses that much CPU time and, at a line of stdin, executes this file
 *
 * Each prints its process id when it is so far; "shared" prints that of the child too, "short" again at the end.
 */
#define _GNU_SOURCE
#include <pthread.h>
#include <sched.h>
#include <signal.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static char **arguments;

static double used_ms(void) {
    struct timespec t;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &t);
    return t.tv_sec * 1e3 + t.tv_nsec / 1e6;
}

static void say(int other) {
    printf("%d %d\n", getpid(), other);
    fflush(stdout);
}

static int busy(void *unused) {
    for (volatile int i = 0;; i++) {}
    return unused != NULL;
}

static void *brief(void *unused) {
    for (volatile int i = 0; i < 20000; i++) {}
    return unused;
}

static void *burner(void *unused) {
    busy(unused);
    return unused;
}

static void *storm(void *unused) {
    usleep(500);
    execv("/proc/thread-self/exe", arguments);
    _exit(1);
    return unused;
}

static void *headless(void *unused) {
    double until = atof(arguments[2]);
    while (used_ms() < until) {}
    say(0);
    if (getchar() != EOF)
        execl("/proc/thread-self/exe", "odd_target", "rest", (char *)NULL);
    _exit(1);
    return unused;
}

int main(int count, char **values) {
    const char *kind = count > 1 ? values[1] : "";
    pthread_t thread;
    arguments = values;
    if (!strcmp(kind, "vfork")) {
        say(0);
        if (!vfork())
            execl("/bin/sleep", "sleep", "1", (char *)NULL);
        pid_t child = vfork();
        if (!child) {
            struct timespec minute = {60, 0};
            nanosleep(&minute, NULL);
            _exit(0);
        }
    } else if (!strcmp(kind, "shared")) {
        static char stack[1 << 16];
        say(clone(busy, stack + sizeof stack, CLONE_VM | CLONE_FILES | SIGCHLD, NULL));
    } else if (!strcmp(kind, "short")) {
        say(0);
        getchar();
        for (int i = 0; i < 10000; i++)
            if (!pthread_create(&thread, NULL, brief, NULL))
                pthread_join(thread, NULL);
        say(0);
    } else if (!strcmp(kind, "storm")) {
        static int said;
        if (!getenv("SAID")) {
            setenv("SAID", "1", 1);
            said = 1;
            say(said);
        }
        pthread_create(&thread, NULL, storm, NULL);
    } else if (!strcmp(kind, "zombies")) {
        for (int i = 0; i < 50; i++)
            if (!fork())
                _exit(0);
        say(0);
    } else if (!strcmp(kind, "burners")) {
        for (int i = atoi(values[2]); i > 0; i--)
            pthread_create(&thread, NULL, burner, NULL);
        say(0);
    } else if (!strcmp(kind, "headless")) {
        pthread_create(&thread, NULL, headless, NULL);
        pthread_exit(NULL);
    } else
        say(0);
    for (;;)
        pause();
}
