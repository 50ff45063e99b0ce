/* duty BURST_US PERIOD_US: one thread burns in bursts and writes down its CPU clock at their edges only.
 *
 * Inside a burst it counts and reads no clock: to read a thread's CPU clock updates the kernel's account of it,
 * so a sampler outside would find a newer account than that of an ordinary program. The length of the count is
 * corrected after each burst, because the speed of a core changes.
 * Prints its tid; for each line on stdin, the edges since the last one: monotonic ns, CPU ns. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

enum { EDGES = 1 << 20 };

static long long edges[EDGES][2], burst_ns, period_ns;
static volatile long written, tid;
static volatile unsigned long sink;

static long long now_ns(clockid_t clock)
{
    struct timespec now;
    clock_gettime(clock, &now);
    return now.tv_sec * 1000000000LL + now.tv_nsec;
}

static void count(unsigned long turns)
{
    while (turns--)
        sink += turns;
}

static long long edge(void)
{
    long long wall_ns = now_ns(CLOCK_MONOTONIC), cpu_ns = now_ns(CLOCK_THREAD_CPUTIME_ID);
    if (written < EDGES) {
        edges[written][0] = wall_ns;
        edges[written][1] = cpu_ns;
        written++;
    }
    return cpu_ns;
}

static void *work(void *unused)
{
    (void)unused;
    prctl(PR_SET_NAME, "duty");
    double turns = 100000;
    tid = syscall(SYS_gettid);
    for (;;) {
        long long next = now_ns(CLOCK_MONOTONIC) + period_ns;
        long long begin = edge();
        count(turns);
        double due = turns * burst_ns / (edge() - begin);
        turns += (due - turns) / 4;
        long long rest = next - now_ns(CLOCK_MONOTONIC);
        if (rest > 0)
            nanosleep(&(struct timespec){rest / 1000000000, rest % 1000000000}, NULL);
    }
}

int main(int words, char **word)
{
    if (words != 3)
        return 2;
    burst_ns = atoll(word[1]) * 1000;
    period_ns = atoll(word[2]) * 1000;
    pthread_t thread;
    if (pthread_create(&thread, NULL, work, NULL))
        return 1;
    while (!tid)
        usleep(1000);
    printf("%ld\n", tid);
    fflush(stdout);
    char line[16];
    long shown = 0;
    while (fgets(line, sizeof line, stdin)) {
        long until = written;
        for (; shown < until; shown++)
            printf("%lld %lld ", edges[shown][0], edges[shown][1]);
        printf("\n");
        fflush(stdout);
    }
    return 0;
}
