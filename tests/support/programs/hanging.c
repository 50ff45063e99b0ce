/*
 * A client whose event loop beats every 50 ms, and hangs on command: hanging PAGE SLOT LIMIT_MS LOOP DIRECTORY
 *
 *   PAGE   path of the page of heartbeats, as in the ready line
 *   LOOP   how the loop waits: native for epoll, or cond for a condition variable
 *
 * DIRECTORY has a file "big" of 64 MiB. A line of stdin "KIND MS" makes the loop hang for that time. After every gap of more
 * than half of the limit between two beats the program prints "gap NS CPU_NS WAIT_NS": its length, and how long its
 * thread ran and waited for a CPU in it. It exits at the end of stdin.
 *
 * With -DLIBRARY it is only the functions spin_ms and sleep_ms, for a Python program to call with the interpreter lock.
 */
#define _GNU_SOURCE
#include <fcntl.h>
#include <poll.h>
#include <pthread.h>
#include <sched.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/epoll.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/syscall.h>
#include <sys/wait.h>
#include <time.h>
#include <unistd.h>

static uint64_t ns(clockid_t clock) {
    struct timespec t;
    clock_gettime(clock, &t);
    return (uint64_t)t.tv_sec * 1000000000 + t.tv_nsec;
}

static uint64_t now(void) { return ns(CLOCK_MONOTONIC); }

void sleep_ms(long ms) {
    struct timespec t = {ms / 1000, ms % 1000 * 1000000};
    nanosleep(&t, NULL);
}

void spin_ms(long ms) {
    uint64_t until = now() + (uint64_t)ms * 1000000;
    while (now() < until) {}
}

#ifndef LIBRARY

enum { MAGIC = 0, VERSION = 1, FIRST = 16, BEAT = 0, GAP, GAP_END, LIMIT, OWNER, OWNER_START, STATE, NAME = 8 };
#define FILE_BYTES (64 << 20)

static uint64_t *slot, limit_ns, last, cpu_last, wait_last;
static char *directory;
static long wait_ms;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER, idle_mutex = PTHREAD_MUTEX_INITIALIZER;
static pthread_cond_t never = PTHREAD_COND_INITIALIZER;
static int pipe_ends[2], pair[2], dropped;
static volatile int ready, done;
static char order[512];

static void store(int word, uint64_t value) { __atomic_store_n(&slot[word], value, __ATOMIC_RELEASE); }

static uint64_t waited_ns(void) {
    static int fd = -1;
    char text[128] = "";
    unsigned long long ran, waited = 0;
    if (fd < 0)
        fd = open("/proc/thread-self/schedstat", O_RDONLY);
    if (pread(fd, text, sizeof text - 1, 0) < 1 || sscanf(text, "%llu %llu", &ran, &waited) != 2)
        exit(8);
    return waited;
}

static void beat(void) {
    uint64_t t = now(), cpu = ns(CLOCK_THREAD_CPUTIME_ID), waited = waited_ns();
    if (last && t - last > limit_ns) {
        store(GAP, t - last);
        store(GAP_END, t);
    }
    store(BEAT, t);
    if (last && t - last > limit_ns / 2) {
        printf("gap %llu %llu %llu\n", (unsigned long long)(t - last), (unsigned long long)(cpu - cpu_last),
               (unsigned long long)(waited - wait_last));
        fflush(stdout);
    }
    last = t;
    cpu_last = cpu;
    wait_last = waited;
}

static void cond_wait(long ms) {
    struct timespec until;
    clock_gettime(CLOCK_REALTIME, &until);
    until.tv_sec += ms / 1000;
    until.tv_nsec += ms % 1000 * 1000000;
    if (until.tv_nsec >= 1000000000) {
        until.tv_sec++;
        until.tv_nsec -= 1000000000;
    }
    pthread_mutex_lock(&idle_mutex);
    while (pthread_cond_timedwait(&never, &idle_mutex, &until) == 0) {}
    pthread_mutex_unlock(&idle_mutex);
}

static void epoll_idle(long ms) {
    struct epoll_event event;
    int fd = epoll_create1(EPOLL_CLOEXEC);
    epoll_wait(fd, &event, 1, ms);
    close(fd);
}

static char *path_of(const char *name) {
    static char path[512];
    snprintf(path, sizeof path, "%s/%s", directory, name);
    return path;
}

static int big_file(int flags) {
    int fd = open(path_of("big"), O_RDONLY | flags);
    if (fd < 0)
        exit(3);
    return fd;
}

static void *hold_mutex(void *unused) {
    pthread_mutex_lock(&mutex);
    ready = 1;
    sleep_ms(wait_ms);
    pthread_mutex_unlock(&mutex);
    return unused;
}

static void *write_later(void *fd) {
    ready = 1;
    sleep_ms(wait_ms);
    if (write(*(int *)fd, "x", 1) < 0)
        exit(4);
    return NULL;
}

static void *hold_flock(void *unused) {
    int fd = open(path_of("lock"), O_RDWR | O_CREAT, 0600);
    flock(fd, LOCK_EX);
    ready = 1;
    sleep_ms(wait_ms);
    close(fd);
    return unused;
}

static void *sleep_on(void *unused) {
    ready = 1;
    pause();
    return unused;
}

static void *drop_pages(void *map) {
    while (!done) {
        madvise(map, FILE_BYTES, MADV_PAGEOUT);
        posix_fadvise(dropped, 0, 0, POSIX_FADV_DONTNEED);
        ready = 1;
        sleep_ms(20);
    }
    return NULL;
}

static void with(void *(*helper)(void *), void *argument, pthread_t *thread) {
    ready = 0;
    pthread_create(thread, NULL, helper, argument);
    while (!ready)
        sched_yield();
}

static void hang(const char *kind, long ms) {
    uint64_t until = now() + (uint64_t)ms * 1000000;
    pthread_t helper = 0;
    char byte;
    wait_ms = ms;
    if (!strcmp(kind, "spin")) {
        spin_ms(ms);
    } else if (!strcmp(kind, "syscalls")) {
        while (now() < until)
            syscall(SYS_getppid);
    } else if (!strcmp(kind, "work")) { /* until it has used that much CPU time */
        uint64_t cpu = ns(CLOCK_THREAD_CPUTIME_ID) + (uint64_t)ms * 1000000;
        while (ns(CLOCK_THREAD_CPUTIME_ID) < cpu) {}
    } else if (!strcmp(kind, "mutex")) {
        with(hold_mutex, NULL, &helper);
        pthread_mutex_lock(&mutex);
        pthread_mutex_unlock(&mutex);
    } else if (!strcmp(kind, "pipe")) {
        with(write_later, &pipe_ends[1], &helper);
        if (read(pipe_ends[0], &byte, 1) != 1)
            exit(5);
    } else if (!strcmp(kind, "socket")) {
        with(write_later, &pair[1], &helper);
        if (read(pair[0], &byte, 1) != 1)
            exit(5);
    } else if (!strcmp(kind, "flock")) {
        with(hold_flock, NULL, &helper);
        int fd = open(path_of("lock"), O_RDWR);
        flock(fd, LOCK_EX);
        close(fd);
    } else if (!strcmp(kind, "nanosleep")) {
        sleep_ms(ms);
    } else if (!strcmp(kind, "waitpid")) {
        pid_t child = fork();
        if (child == 0) {
            sleep_ms(ms);
            _exit(0);
        }
        waitpid(child, NULL, 0);
    } else if (!strcmp(kind, "direct")) {
        int fd = big_file(O_DIRECT);
        void *buffer = aligned_alloc(4096, 4096);
        until = now() + (uint64_t)ms * 1000000;
        while (now() < until)
            if (pread(fd, buffer, 4096, (off_t)(random() % (FILE_BYTES / 4096)) * 4096) < 0)
                exit(6);
        free(buffer);
        close(fd);
    } else if (!strcmp(kind, "paging")) {
        dropped = big_file(0);
        volatile char *map = mmap(NULL, FILE_BYTES, PROT_READ, MAP_SHARED, dropped, 0);
        madvise((void *)map, FILE_BYTES, MADV_RANDOM);
        done = 0;
        with(drop_pages, (void *)map, &helper);
        until = now() + (uint64_t)ms * 1000000;
        while (now() < until)
            byte = map[(size_t)(random() % (FILE_BYTES / 4096)) * 4096];
        done = 1;
        pthread_join(helper, NULL);
        helper = 0;
        munmap((void *)map, FILE_BYTES);
        close(dropped);
    } else if (!strcmp(kind, "epoll")) {
        epoll_idle(ms);
    } else if (!strcmp(kind, "poll")) {
        poll(NULL, 0, ms);
    } else if (!strcmp(kind, "select")) {
        struct timeval t = {ms / 1000, ms % 1000 * 1000};
        select(0, NULL, NULL, NULL, &t);
    } else if (!strcmp(kind, "cond")) {
        cond_wait(ms);
    } else if (!strcmp(kind, "starve")) { /* a child of the same session, and so of the same scheduler group, takes its CPU */
        cpu_set_t all, one;
        struct sched_param none = {0};
        sched_getaffinity(0, sizeof all, &all);
        CPU_ZERO(&one);
        CPU_SET(sched_getcpu(), &one);
        sched_setaffinity(0, sizeof one, &one);
        pid_t child = fork();
        if (child == 0) {
            spin_ms(ms);
            _exit(0);
        }
        sched_setscheduler(0, SCHED_IDLE, &none);
        while (waitpid(child, NULL, WNOHANG) == 0) {}
        sched_setscheduler(0, SCHED_OTHER, &none);
        sched_setaffinity(0, sizeof all, &all);
    } else if (!strcmp(kind, "end")) { /* the thread that beats ends, and the process goes on */
        with(sleep_on, NULL, &helper);
        pthread_exit(NULL);
    } else {
        exit(2);
    }
    if (helper)
        pthread_join(helper, NULL);
}

int main(int count, char **arguments) {
    int fd = open(arguments[1], O_RDWR);
    uint64_t *page = mmap(NULL, 8192, PROT_READ | PROT_WRITE, MAP_SHARED, fd, 0);
    if (count < 6 || page == MAP_FAILED || pipe(pipe_ends) || socketpair(AF_UNIX, SOCK_STREAM, 0, pair))
        return 1;
    directory = arguments[5];
    slot = page + FIRST + 16 * atoi(arguments[2]);
    limit_ns = strtoull(arguments[3], NULL, 10) * 1000000;
    int by_cond = !strcmp(arguments[4], "cond");
    memcpy(&slot[NAME], "ui", 3);
    store(LIMIT, limit_ns);
    store(OWNER, (uint64_t)getpid() << 32 | (uint64_t)syscall(SYS_gettid));
    store(STATE, 1);

    struct epoll_event in = {.events = EPOLLIN}, event;
    int loop = epoll_create1(0);
    epoll_ctl(loop, EPOLL_CTL_ADD, 0, &in);
    for (;;) {
        struct pollfd standard = {0, POLLIN, 0};
        if (by_cond)
            cond_wait(50);
        int readable = by_cond ? poll(&standard, 1, 0) : epoll_wait(loop, &event, 1, 50);
        beat();
        if (readable <= 0)
            continue;
        char kind[32];
        long ms;
        ssize_t length = read(0, order, sizeof order - 1);
        if (length <= 0)
            return 0;
        order[length] = 0;
        if (sscanf(order, "%31s %ld", kind, &ms) != 2)
            return 7;
        beat();
        hang(kind, ms);
        beat();
    }
}
#endif
