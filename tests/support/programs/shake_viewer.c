/*
 * A client that leaks, has a thread that runs away, hangs and aborts: shake_viewer UNIT, where UNIT is in seconds.
 *
 * From 2 units on it leaks 1 MiB in each 0.1 s, from 4 units on "telemetry" burns a core, at 6 units the main thread
 * waits for a lock that "decoder" holds, and at 9 units it aborts.
 */
#define _GNU_SOURCE
#include <math.h>
#include <pthread.h>
#include <signal.h>
#include <stdlib.h>
#include <string.h>
#include <time.h>
#include <unistd.h>

static pthread_mutex_t document = PTHREAD_MUTEX_INITIALIZER;
static double begun, unit;

static double age(void)
{
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return ((double)now.tv_sec + (double)now.tv_nsec / 1e9 - begun) / unit;
}

static void rest(double seconds)
{
    struct timespec pause = {(time_t)seconds, (long)((seconds - floor(seconds)) * 1e9)};
    nanosleep(&pause, NULL);
}

static void burn(double seconds)
{
    double end = age() + seconds / unit;
    while (age() < end)
        ;
}

static void name(const char *text)
{
#ifdef __APPLE__
    pthread_setname_np(text);
#else
    pthread_setname_np(pthread_self(), text);
#endif
}

static void *telemetry(void *unused)
{
    name("telemetry");
    for (;;)
        if (age() < 4)
            rest(0.05);
        else
            burn(0.05);
    return unused;
}

static void *decoder(void *unused)
{
    name("decoder");
    pthread_mutex_lock(&document);
    for (;;)
        pause();
    return unused;
}

static void give_up(int signal)
{
    (void)signal;
    abort();
}

int main(int count, char **words)
{
    pthread_t one, two;
    unit = count > 1 ? atof(words[1]) : 1;
    begun = age() * unit;
    signal(SIGALRM, give_up);
    pthread_create(&one, NULL, telemetry, NULL);
    pthread_create(&two, NULL, decoder, NULL);
    while (age() < 6) {
        if (age() > 2)
            memset(malloc(1 << 20), 1, 1 << 20);
        burn(0.03);
        rest(0.07);
    }
    alarm((unsigned)(3 * unit));
    pthread_mutex_lock(&document);
    return 0;
}
