/* target THREADS BUSY BURN_US PERIOD_US: THREADS named threads, of which BUSY burn BURN_US of CPU every
 * PERIOD_US and the others sleep without end. Prints its pid when all are there. */
#define _GNU_SOURCE
#include <pthread.h>
#include <stdio.h>
#include <stdlib.h>
#include <sys/prctl.h>
#include <time.h>
#include <unistd.h>

static long burn_ns, period_ns;

static void name_thread(const char *kind, long number)
{
    char name[16];
    snprintf(name, sizeof name, "%s (%ld)", kind, number % 10000);
    prctl(PR_SET_NAME, name);
}

static void burn(long ns)
{
    struct timespec begin, now;
    clock_gettime(CLOCK_THREAD_CPUTIME_ID, &begin);
    do
        clock_gettime(CLOCK_THREAD_CPUTIME_ID, &now);
    while ((now.tv_sec - begin.tv_sec) * 1000000000L + now.tv_nsec - begin.tv_nsec < ns);
}

static void *sleeping(void *number)
{
    name_thread("idle", (long)number);
    burn(20000 + (long)number % 7 * 20000); /* so that its counter has as many digits as a real one */
    for (;;)
        pause();
}

static void *working(void *number)
{
    name_thread("busy", (long)number);
    for (;;) {
        burn(burn_ns);
        struct timespec rest = {0, period_ns - burn_ns};
        nanosleep(&rest, NULL);
    }
}

int main(int count, char **words)
{
    if (count != 5)
        return 2;
    long threads = atol(words[1]), busy = atol(words[2]);
    burn_ns = atol(words[3]) * 1000;
    period_ns = atol(words[4]) * 1000;
    pthread_attr_t small;
    pthread_attr_init(&small);
    pthread_attr_setstacksize(&small, 32768);
    for (long number = 1; number < threads; number++) {
        pthread_t thread;
        if (pthread_create(&thread, &small, number <= busy ? working : sleeping, (void *)number)) {
            perror("pthread_create");
            return 1;
        }
    }
    printf("%d\n", getpid());
    fflush(stdout);
    for (;;)
        pause();
}
