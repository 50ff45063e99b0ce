/*
 * A process that does at random what threads can do: random_target obey|free SEED [EXECUTIONS]
 *
 * "obey" obeys one command per line of stdin, and answers when all of its threads rest again with what its clocks say:
 *
 *   burn THREAD US    a thread uses CPU time       born US           a thread is made, which uses CPU time
 *   exit THREAD       a thread ends                name THREAD TEXT  a thread is renamed by the one that reads the commands
 *   exec THREAD       a thread executes this file  leave             the main thread exits, and another reads the commands
 *   rest              nothing
 *
 * An answer is: CLOCK_MONOTONIC, CPU time of the process, executions so far, then TID:CPU:NAME for each thread, times in
 * ns and the name in hexadecimal. A command for a thread that there is not is one for the thread that reads them.
 *
 * "free" does the same by itself, several threads at once, and says nothing.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <pthread.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { SLOTS = 24 };

struct command {
    char what;
    long us;
};

struct slot {
    pthread_t thread;
    pid_t tid;
    int commands[2];
};

static struct slot slots[SLOTS];
static int done[2];
static pid_t leader, controller;
static int executions;
static char *mode, *seed;

static int64_t clock_ns(clockid_t clock) {
    struct timespec t;
    if (clock_gettime(clock, &t))
        return 0;
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static void burn(long us) {
    int64_t until = clock_ns(CLOCK_THREAD_CPUTIME_ID) + us * 1000;
    while (clock_ns(CLOCK_THREAD_CPUTIME_ID) < until) {}
}

static void execute(void) {
    char count[16];
    snprintf(count, sizeof count, "%d", executions + 1);
    char *arguments[] = {"random_target", mode, seed, count, NULL};
    execv("/proc/thread-self/exe", arguments);
    _exit(1);
}

static void *worker(void *argument) {
    struct slot *slot = argument;
    struct command command = {0};
    slot->tid = syscall(SYS_gettid);
    for (;;) {
        if (read(slot->commands[0], &command, sizeof command) != sizeof command)
            return NULL;
        if (command.what == 'e')
            execute();
        burn(command.us);
        if (write(done[1], "", 1) != 1 || command.what == 'x')
            return NULL;
    }
}

static void wait_done(void) {
    char byte;
    while (read(done[0], &byte, 1) != 1) {}
}

static void tell(struct slot *slot, char what, long us) {
    struct command command = {what, us};
    if (write(slot->commands[1], &command, sizeof command) != sizeof command)
        _exit(1);
}

static void born(long us) {
    for (struct slot *slot = slots; slot < slots + SLOTS; slot++)
        if (!slot->tid) {
            if (pipe2(slot->commands, O_CLOEXEC) || pthread_create(&slot->thread, NULL, worker, slot))
                _exit(1);
            tell(slot, 'b', us);
            wait_done();
            return;
        }
}

static void end(struct slot *slot) {
    char path[64];
    tell(slot, 'x', 0);
    wait_done();
    pthread_join(slot->thread, NULL);
    snprintf(path, sizeof path, "/proc/self/task/%d", slot->tid);
    while (!access(path, F_OK)) {} /* the kernel lists it for a moment longer */
    close(slot->commands[0]);
    close(slot->commands[1]);
    slot->tid = 0;
}

static void show(pid_t tid) {
    char path[64], name[32] = "";
    snprintf(path, sizeof path, "/proc/self/task/%d/comm", tid);
    FILE *file = fopen(path, "r");
    size_t length = file ? fread(name, 1, sizeof name, file) : 0;
    if (file)
        fclose(file);
    printf(" %d:%lld:", tid, (long long)clock_ns((~(clockid_t)tid << 3) | 6));
    for (size_t i = 0; i + 1 < length; i++)
        printf("%02x", (unsigned char)name[i]);
}

static void answer(void) {
    printf("%lld %lld %d", (long long)clock_ns(CLOCK_MONOTONIC), (long long)clock_ns(CLOCK_PROCESS_CPUTIME_ID), executions);
    show(leader);
    if (controller != leader)
        show(controller);
    for (struct slot *slot = slots; slot < slots + SLOTS; slot++)
        if (slot->tid)
            show(slot->tid);
    putchar('\n');
    fflush(stdout);
}

static void *control(void *left) {
    char line[256], text[64];
    controller = syscall(SYS_gettid);
    if (left) { /* the main thread, which has exited */
        char path[64], stat[512], *end = NULL;
        snprintf(path, sizeof path, "/proc/self/task/%d/stat", leader);
        while (!end || end[2] != 'Z') {
            FILE *file = fopen(path, "r");
            stat[fread(stat, 1, sizeof stat - 1, file)] = 0;
            end = strrchr(stat, ')');
            fclose(file);
        }
    }
    answer();
    while (fgets(line, sizeof line, stdin)) {
        int number = 0;
        long us = 0;
        struct slot *slot = NULL;
        text[0] = 0;
        if (sscanf(line, "burn %d %ld", &number, &us) == 2 || sscanf(line, "exit %d", &number) == 1
            || sscanf(line, "exec %d", &number) == 1 || sscanf(line, "name %d %63[^\n]", &number, text) >= 1)
            slot = number >= 0 && number < SLOTS && slots[number].tid ? slots + number : NULL;
        if (line[0] == 'b' && line[1] == 'u') {
            if (slot) {
                tell(slot, 'b', us);
                wait_done();
            } else
                burn(us);
        } else if (sscanf(line, "born %ld", &us) == 1)
            born(us);
        else if (line[0] == 'e' && line[2] == 'i' && slot)
            end(slot);
        else if (line[0] == 'e' && line[2] == 'e') {
            if (!slot)
                execute();
            tell(slot, 'e', 0);
            for (;;)
                pause();
        } else if (line[0] == 'n') {
            if (slot)
                pthread_setname_np(slot->thread, text);
            else
                prctl(PR_SET_NAME, text, 0, 0, 0);
        } else if (line[0] == 'l' && controller == leader) {
            pthread_t other;
            if (pthread_create(&other, NULL, control, slots))
                _exit(1);
            pthread_exit(NULL);
        }
        answer();
    }
    _exit(0);
}

static void *restless(void *argument) {
    unsigned state = (unsigned)(uintptr_t)argument * 2654435761u + (unsigned)atoi(seed) * 97u + (unsigned)executions;
    for (;;) {
        int chance = rand_r(&state) % 100;
        burn(rand_r(&state) % 1500);
        if (chance < 20) {
            pthread_t other;
            static int threads;
            if (__atomic_add_fetch(&threads, 1, __ATOMIC_RELAXED) > SLOTS) {
                __atomic_sub_fetch(&threads, 1, __ATOMIC_RELAXED);
                if (argument)
                    return NULL;
            } else if (!pthread_create(&other, NULL, restless, (void *)(uintptr_t)rand_r(&state)))
                pthread_detach(other);
        } else if (chance < 35 && argument)
            return NULL;
        else if (chance < 50)
            prctl(PR_SET_NAME, &"a) R 1\0b (c\0d\ne"[rand_r(&state) % 13], 0, 0, 0);
        else if (chance < 52)
            execute();
        usleep(rand_r(&state) % 3000);
    }
}

int main(int count, char **values) {
    if (count < 3 || pipe2(done, O_CLOEXEC))
        return 2;
    mode = values[1];
    seed = values[2];
    executions = count > 3 ? atoi(values[3]) : 0;
    leader = controller = getpid();
    if (!strcmp(mode, "free"))
        restless(NULL);
    control(NULL);
}
