/*
 * A part of macOS' libSystem for Linux: the functions vitalsd calls, under their real names and with
 * the rules of XNU, over the real threads and processes of this machine.
 *
 * Sections in brackets are those of docs/macos-proof.md. Kernel ticks run at 24 MHz, as on Apple silicon.
 * What starts with sim_ is for the tests: faults, oddities, and the record of violated rules.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <errno.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdbool.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/prctl.h>
#include <sys/resource.h>
#include <sys/stat.h>
#include <time.h>
#include <unistd.h>

enum {
    KERN_SUCCESS = 0,
    KERN_INVALID_ARGUMENT = 4,
    KERN_INVALID_NAME = 15,
    KERN_INVALID_TASK = 16,
    KERN_INVALID_CAPABILITY = 20,
    KERN_TERMINATED = 37,
    MACH_SEND_INVALID_DEST = 0x10000003,
    ARGUMENTS_MAX = 1024 * 1024,
    SHORT_REPLY = -1,
    NO_PATH = -2, /* PROC_PIDVNODEPATHINFO answers an empty path */
    PATH_ROOM = 1024,
};
#define MACH_PORT_DEAD 0xffffffffu
#define TASK_SELF 0x103u
#define HOST_SELF 0x203u

uint32_t mach_task_self_ = TASK_SELF;

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;

/* Violations: what would kill, corrupt or leak on a Mac */

static char violations[64][160];
static long violation_count;

static void violation(const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    if (violation_count < 64)
        vsnprintf(violations[violation_count], sizeof violations[0], format, arguments);
    va_end(arguments);
    violation_count++;
}

long sim_violations(void) { return violation_count; }
const char *sim_violation(long i) { return i < violation_count && i < 64 ? violations[i] : ""; }

/* Faults on demand */

static struct fault {
    char function[32];
    int flavor; /* -1: any */
    long at, every, code, calls;
} faults[32];
static int fault_count;

/* From now on, call `at` (1 is the next) of the function fails with `code`, and then each `every`-th (0: never). */
void sim_fault(const char *function, int flavor, long at, long every, long code)
{
    pthread_mutex_lock(&lock);
    struct fault *f = &faults[fault_count++ % 32];
    snprintf(f->function, sizeof f->function, "%s", function);
    f->flavor = flavor;
    f->at = at;
    f->every = every;
    f->code = code;
    f->calls = 0;
    pthread_mutex_unlock(&lock);
}

void sim_clear_faults(void)
{
    pthread_mutex_lock(&lock);
    memset(faults, 0, sizeof faults);
    fault_count = 0;
    pthread_mutex_unlock(&lock);
}

static long fault(const char *function, int flavor)
{
    long code = 0;
    for (int i = 0; i < fault_count && i < 32; i++) {
        struct fault *f = &faults[i];
        if (strcmp(f->function, function) || (f->flavor >= 0 && f->flavor != flavor))
            continue;
        f->calls++;
        if (f->calls == f->at || (f->every && f->calls > f->at && (f->calls - f->at) % f->every == 0))
            code = f->code;
    }
    return code;
}

/* Clocks [4, 5] */

static long long slept_ns, boot_wall_ns, boot_sleep_ns, frequency_stated = 24000000, perf_levels = 2;
static bool translated;

static long long clock_ns(clockid_t id)
{
    struct timespec t;
    if (clock_gettime(id, &t))
        return -1;
    return t.tv_sec * 1000000000LL + t.tv_nsec;
}

static uint64_t ticks(long long ns) { return ns < 0 ? 0 : (uint64_t)ns * 3 / 125; }

/* The Rosetta runtime makes these three agree on 1/1; what the kernel writes stays in ticks [5]. */
uint64_t mach_absolute_time(void)
{
    long long ns = clock_ns(CLOCK_MONOTONIC);
    return translated ? (uint64_t)ns : ticks(ns);
}

uint64_t mach_continuous_time(void)
{
    long long ns = clock_ns(CLOCK_BOOTTIME) + slept_ns;
    return translated ? (uint64_t)ns : ticks(ns);
}

int mach_timebase_info(uint32_t *info)
{
    info[0] = translated ? 1 : 125;
    info[1] = translated ? 1 : 3;
    return KERN_SUCCESS;
}

void sim_sleep(long long ns) { slept_ns += ns; }
void sim_rosetta(int on) { translated = on; }
void sim_tbfrequency(long long stated) { frequency_stated = stated; }
void sim_perf_levels(long long levels) { perf_levels = levels; }

/* /proc */

struct stat_line {
    char comm[64], state;
    bool ending; /* this thread is exiting, or SIGKILL waits for it */
    unsigned long long ppid, utime, stime, cutime, cstime, minflt, majflt, priority, threads, start, vsize, rss, image;
};

static bool read_file(const char *path, char *text, size_t size)
{
    int fd = open(path, O_RDONLY | O_CLOEXEC);
    if (fd < 0)
        return false;
    ssize_t n = read(fd, text, size - 1);
    close(fd);
    if (n <= 0)
        return false;
    text[n] = 0;
    return true;
}

static bool read_stat(const char *path, struct stat_line *s)
{
    char text[1024];
    if (!read_file(path, text, sizeof text))
        return false;
    char *open_ = strchr(text, '('), *close_ = strrchr(text, ')');
    if (!open_ || !close_)
        return false;
    *close_ = 0;
    snprintf(s->comm, sizeof s->comm, "%s", open_ + 1);
    s->state = close_[2];
    unsigned long long field[52] = {0};
    char *next = close_ + 3;
    for (int i = 4; i <= 31; i++)
        field[i] = strtoull(next, &next, 10);
    s->ending = strchr("ZX", s->state) || field[9] & 4 /* PF_EXITING */ || field[31] & 1 << (SIGKILL - 1);
    s->ppid = field[4];
    s->minflt = field[10];
    s->majflt = field[12];
    s->utime = field[14];
    s->stime = field[15];
    s->cutime = field[16];
    s->cstime = field[17];
    s->priority = field[18];
    s->threads = field[20];
    s->start = field[22];
    s->vsize = field[23];
    s->rss = field[24];
    s->image = field[26] ^ field[27] << 7 ^ field[28];
    return true;
}

static int compare_ids(const void *a, const void *b)
{
    uint64_t x = *(const uint64_t *)a, y = *(const uint64_t *)b;
    return x < y ? -1 : x > y;
}

/* Numbers that a directory lists, ascending, in a buffer of the caller's that grows. */
static long list_numbers(const char *path, uint64_t **ids, long *room)
{
    DIR *directory = opendir(path);
    if (!directory)
        return -1;
    long n = 0;
    for (struct dirent *e; (e = readdir(directory));) {
        if (e->d_name[0] < '0' || e->d_name[0] > '9')
            continue;
        if (n == *room) {
            *room = *room ? 2 * *room : 256;
            *ids = realloc(*ids, *room * sizeof **ids);
        }
        (*ids)[n++] = strtoull(e->d_name, NULL, 10);
    }
    closedir(directory);
    qsort(*ids, n, sizeof **ids, compare_ids);
    return n;
}

/* Port names of our task [2] */

struct port {
    uint32_t generation, references;
    bool used, dead;
    int own; /* references that belong to libpthread */
    struct thread *thread;
};
static struct port *ports;
static uint32_t port_room, ports_used, port_hint;
static const uint32_t first_index = 16;

static uint32_t name_of(struct port *p) { return (uint32_t)(p - ports + first_index) << 8 | (p->generation & 0xff); }

static struct port *port_named(uint32_t name)
{
    uint32_t index = (name >> 8) - first_index;
    if (index >= port_room || !ports[index].used || (ports[index].generation & 0xff) != (name & 0xff))
        return NULL;
    return &ports[index];
}

/* Threads */

struct thread {
    uint64_t id;
    bool real, dying, seen, realtime;
    int kind;       /* of a dying one: how task_threads and thread_info show it */
    long lists_left; /* until it is reaped */
    uint32_t port;
    long long user_ns, system_ns; /* the last reading, or the made-up one */
    int state;
    char name[64], comm[64];
    struct thread *next;
};
static struct thread *threads, **threads_end = &threads;
static long reap_delay, deaths, thread_count;
static long long reaped_ns, made_up_reaped_ns;
static bool real_threads = true;

void sim_reap_delay(long lists) { reap_delay = lists; }

static uint32_t new_port(struct thread *thread)
{
    uint32_t i = port_hint;
    while (i < port_room && ports[i].used)
        i++;
    if (i == port_room) {
        port_room = port_room ? 2 * port_room : 64;
        ports = realloc(ports, port_room * sizeof *ports);
        memset(ports + i, 0, (port_room - i) * sizeof *ports);
    }
    port_hint = i + 1;
    ports[i] = (struct port){.generation = ports[i].generation + 1, .references = 1, .own = 1, .used = true, .thread = thread};
    ports_used++;
    return name_of(&ports[i]);
}

static void drop_reference(struct port *p)
{
    if (--p->references == 0) {
        p->used = false;
        ports_used--;
        if ((uint32_t)(p - ports) < port_hint)
            port_hint = (uint32_t)(p - ports);
    }
}

/* The thread's port is destroyed: names for it become dead names, and libpthread drops its own reference. */
static void disable_port(struct thread *t)
{
    struct port *p = port_named(t->port);
    if (!p)
        return;
    p->dead = true;
    p->thread = NULL;
    p->own = 0;
    drop_reference(p);
    t->port = 0;
}

static struct thread *add_thread(uint64_t id, bool real)
{
    struct thread *t = calloc(1, sizeof *t);
    t->id = id;
    t->real = real;
    t->state = 3;
    t->port = new_port(t);
    *threads_end = t;
    threads_end = &t->next;
    thread_count++;
    return t;
}

static void remove_thread(struct thread **at)
{
    struct thread *t = *at;
    *at = t->next;
    if (threads_end == &t->next)
        threads_end = at;
    if (t->port)
        disable_port(t);
    thread_count--;
    free(t);
}

static void die(struct thread *t)
{
    t->dying = true;
    t->state = 5;
    t->kind = (int)(deaths++ % 4);
    t->lists_left = reap_delay;
    if (t->kind < 2)
        disable_port(t);
}

static void thread_path(char *path, size_t size, uint64_t pid, uint64_t tid, const char *file)
{
    snprintf(path, size, "/proc/%llu/task/%llu/%s", (unsigned long long)pid, (unsigned long long)tid, file);
}

/*
 * SIGSTOP suspends the task: its threads park in assert_wait, TH_STATE_WAITING, and p_stat alone is SSTOP [2, 3].
 * TH_STATE_STOPPED is of thread_stop, which no Linux thread has.
 */
static int run_state(char state) { return state == 'R' ? 1 : state == 'D' ? 4 : state == 'Z' ? 5 : 3; }

static clockid_t thread_clock(uint64_t tid) { return (clockid_t)(~(unsigned)tid << 3 | 6); }

static void split(long long ns, unsigned long long user, unsigned long long system, long long *user_ns, long long *system_ns)
{
    *user_ns = user + system ? (long long)((double)ns * ((double)user / (double)(user + system))) : ns;
    *system_ns = ns - *user_ns;
}

struct totals {
    long long total, living;
};

/* The living real threads by id, rebuilt at each look. */
static struct thread **table;
static long table_size;

static struct thread **table_slot(uint64_t id)
{
    long i = (long)(id * 0x9e3779b97f4a7c15ULL >> 32) & (table_size - 1);
    while (table[i] && table[i]->id != id)
        i = (i + 1) & (table_size - 1);
    return &table[i];
}

static void rebuild_table(long entries)
{
    if (table_size < 2 * entries) {
        table_size = 1024;
        while (table_size < 2 * entries)
            table_size *= 2;
        table = realloc(table, table_size * sizeof *table);
    }
    memset(table, 0, table_size * sizeof *table);
    for (struct thread *t = threads; t; t = t->next)
        if (t->real && !t->dying) {
            t->seen = false;
            *table_slot(t->id) = t;
        }
}

/*
 * Bring our list of threads up to date, reap, and add up. The total is read first, so that a
 * thread that ends meanwhile is missing in the list, and counts with the exited ones.
 */
static struct totals refresh(void)
{
    static uint64_t *ids;
    static long room;
    long long total = clock_ns(CLOCK_PROCESS_CPUTIME_ID), living = 0, dying = 0, made_up = 0;
    if (real_threads) {
        long n = list_numbers("/proc/self/task", &ids, &room);
        rebuild_table(thread_count + n);
        for (long i = 0; i < n; i++) {
            struct thread *t = *table_slot(ids[i]);
            long long ns = clock_ns(thread_clock(ids[i]));
            if (ns < 0)
                continue;
            if (!t)
                t = add_thread(ids[i], true);
            t->seen = true;
            living += ns;
            split(ns, 1, 0, &t->user_ns, &t->system_ns);
        }
    }
    struct thread *first_dead = NULL;
    for (struct thread **at = &threads, *t; (t = *at);) {
        if (t->real && !t->dying && !t->seen) {
            die(t);
            first_dead = first_dead ? first_dead : t;
        }
        if (t->dying && t->lists_left <= 0) {
            if (t == first_dead)
                first_dead = NULL;
            if (!t->real)
                made_up_reaped_ns += t->user_ns + t->system_ns;
            remove_thread(at);
            continue;
        }
        if (!t->real)
            made_up += t->user_ns + t->system_ns;
        else if (t->dying)
            dying += t->user_ns + t->system_ns;
        at = &t->next;
    }
    /* What died since the last look ran a little longer than we saw. */
    if (first_dead && total - living - dying > reaped_ns) {
        first_dead->user_ns += total - living - dying - reaped_ns;
        dying = total - living - reaped_ns;
    }
    if (total - living - dying > reaped_ns)
        reaped_ns = total - living - dying;
    return (struct totals){total + made_up + made_up_reaped_ns, total - reaped_ns + made_up};
}

/* From now on only threads of our making are listed; what the real ones use counts with the exited. */
void sim_hide_real_threads(void)
{
    pthread_mutex_lock(&lock);
    real_threads = false;
    for (struct thread **at = &threads; *at;)
        if ((*at)->real)
            remove_thread(at);
        else
            at = &(*at)->next;
    pthread_mutex_unlock(&lock);
}

__attribute__((constructor)) static void boot(void)
{
    boot_wall_ns = clock_ns(CLOCK_REALTIME) - clock_ns(CLOCK_BOOTTIME);
    boot_sleep_ns = clock_ns(CLOCK_BOOTTIME) - clock_ns(CLOCK_MONOTONIC);
    refresh();
}

/* A thread of our making: no real one stands behind it. */
void sim_add_thread(uint64_t id, long long user_ns, long long system_ns, const char *name, int state)
{
    pthread_mutex_lock(&lock);
    struct thread *t = add_thread(id, false);
    t->user_ns = user_ns;
    t->system_ns = system_ns;
    t->state = state;
    snprintf(t->name, sizeof t->name, "%s", name);
    pthread_mutex_unlock(&lock);
}

void sim_advance_thread(uint64_t id, long long user_ns, long long system_ns)
{
    pthread_mutex_lock(&lock);
    for (struct thread *t = threads; t; t = t->next)
        if (t->id == id) {
            t->user_ns += user_ns;
            t->system_ns += system_ns;
        }
    pthread_mutex_unlock(&lock);
}

/* It ends, and is reaped after some lists (sim_reap_delay). `kind` as in task_threads below. */
/* It gets a time constraint policy: priority 97, and a quantum of up to 50 ms [2]. */
void sim_realtime(uint64_t id)
{
    for (struct thread *t = threads; t; t = t->next)
        t->realtime |= t->id == id;
}

void sim_end_thread(uint64_t id, int kind)
{
    pthread_mutex_lock(&lock);
    for (struct thread *t = threads; t; t = t->next)
        if (t->id == id && !t->dying) {
            deaths = kind;
            die(t);
        }
    pthread_mutex_unlock(&lock);
}

/* As on macOS: the calling thread names itself, with at most 63 bytes [2]. */
int sim_pthread_setname_np(const char *name)
{
    if (strlen(name) > 63)
        return ENAMETOOLONG;
    pthread_mutex_lock(&lock);
    refresh();
    for (struct thread *t = threads; t; t = t->next)
        if (t->real && !t->dying && t->id == (uint64_t)gettid())
            snprintf(t->name, sizeof t->name, "%s", name);
    pthread_mutex_unlock(&lock);
    return 0;
}

/* The real name, for programs that run as on macOS; the name is visible to Linux too, up to its 15 bytes. */
int darwin_pthread_setname_np(const char *name) __asm__("pthread_setname_np");
int darwin_pthread_setname_np(const char *name)
{
    int error = sim_pthread_setname_np(name);
    if (!error)
        prctl(PR_SET_NAME, name);
    return error;
}

/* Name, state, priority and split of a real thread; false: it has ended. */
static bool read_thread(struct thread *t, int *priority)
{
    *priority = t->realtime ? 97 : 31;
    if (!t->real)
        return true;
    struct stat_line s;
    char path[64];
    long long ns = clock_ns(thread_clock(t->id));
    thread_path(path, sizeof path, getpid(), t->id, "stat");
    if (ns < 0 || !read_stat(path, &s))
        return false;
    split(ns, s.utime, s.stime, &t->user_ns, &t->system_ns);
    t->state = s.state == 'Z' ? 3 : run_state(s.state);
    *priority = (int)s.priority;
    snprintf(t->comm, sizeof t->comm, "%s", s.comm);
    return true;
}

struct thread_extended_info {
    uint64_t user_time, system_time;
    int32_t cpu_usage, policy, run_state, flags, sleep_time, curpri, priority, maxpriority;
    char name[64];
};

static long long to_us(long long ns) { return ns / 1000 * 1000; }

/* XNU: a thread has no name until it gives itself one [2]. Linux gives it that of its maker, in the end the process'. */
static bool is_unnamed(const char *comm, long pid)
{
    struct stat_line process;
    char path[64];
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    return read_stat(path, &process) && !strcmp(process.comm, comm);
}

/* Nanoseconds, but cut to microseconds [2]. */
static struct thread_extended_info extended_info(struct thread *t, int priority)
{
    struct thread_extended_info info = {
        .user_time = to_us(t->user_ns),
        .system_time = to_us(t->system_ns),
        .policy = 1,
        .run_state = t->state,
        .curpri = priority,
        .priority = priority,
        .maxpriority = 63,
    };
    memcpy(info.name, t->name[0] || is_unnamed(t->comm, getpid()) ? t->name : t->comm, sizeof info.name);
    return info;
}

/* Arrays that the kernel put into our memory [2] */

static struct array {
    void *address;
    size_t bytes, mapped;
} arrays[256];
static long arrays_held;

long sim_arrays(void) { return arrays_held; }

static void *new_array(size_t bytes)
{
    size_t mapped = (bytes + 4095) / 4096 * 4096;
    for (int i = 0; i < 256; i++)
        if (!arrays[i].address) {
            void *address = mmap(NULL, mapped, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
            arrays[i] = (struct array){address, bytes, mapped};
            arrays_held++;
            return address;
        }
    violation("256 arrays were never given back");
    return NULL;
}

int vm_deallocate(uint32_t task, uintptr_t address, size_t size)
{
    pthread_mutex_lock(&lock);
    int code = (int)fault("vm_deallocate", -1);
    struct array *found = NULL;
    for (int i = 0; i < 256; i++)
        if (arrays[i].address && (uintptr_t)arrays[i].address == address)
            found = &arrays[i];
    if (!code && task != TASK_SELF)
        code = MACH_SEND_INVALID_DEST;
    if (!code && !found) {
        violation("vm_deallocate of memory that no call returned, or for the second time");
        code = KERN_INVALID_ARGUMENT;
    }
    if (!code) {
        if (size != found->bytes)
            violation("vm_deallocate of %zu bytes, not %zu", size, found->bytes);
        munmap(found->address, found->mapped);
        found->address = NULL;
        arrays_held--;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

/* The Mach calls [1, 2] */

int task_threads(uint32_t task, uint32_t **list, uint32_t *count)
{
    pthread_mutex_lock(&lock);
    int code = (int)fault("task_threads", -1);
    if (!code && task != TASK_SELF)
        code = MACH_SEND_INVALID_DEST;
    if (!code) {
        for (struct thread *t = threads; t; t = t->next)
            t->lists_left -= t->dying;
        refresh();
        uint32_t *out = new_array(thread_count * sizeof *out);
        uint32_t n = 0;
        for (struct thread *t = threads; t; t = t->next) {
            struct port *p = port_named(t->port);
            if (p)
                p->references++;
            /* Dying: no port, dead, or the port of a thread that is inactive (2) or detached (3). */
            out[n++] = p ? t->port : t->kind ? MACH_PORT_DEAD : 0;
        }
        *list = out;
        *count = n;
    }
    pthread_mutex_unlock(&lock);
    return code;
}

/* The host port [6, 11]: other libraries of the process hold one reference, each mach_host_self adds one. */

static uint32_t host_references = 1;

uint32_t mach_host_self(void)
{
    pthread_mutex_lock(&lock);
    long injected = fault("mach_host_self", -1);
    if (!injected)
        host_references++;
    pthread_mutex_unlock(&lock);
    return injected ? 0 : HOST_SELF;
}

static int release_host_port(void)
{
    if (host_references <= 1) {
        violation("release of the host port, which another library holds");
        return KERN_INVALID_NAME;
    }
    host_references--;
    return KERN_SUCCESS;
}

int mach_port_deallocate(uint32_t task, uint32_t name)
{
    pthread_mutex_lock(&lock);
    int code = (int)fault("mach_port_deallocate", -1);
    if (!code && task != TASK_SELF)
        code = MACH_SEND_INVALID_DEST;
    if (!code && name == HOST_SELF)
        code = release_host_port();
    else if (!code && name != 0 && name != MACH_PORT_DEAD) {
        struct port *p = port_named(name);
        if (p && p->own && p->references == 1 && p->thread->real && clock_ns(thread_clock(p->thread->id)) < 0) {
            struct thread *ended = p->thread;
            die(ended);
            disable_port(ended);
            p = NULL;
        }
        if (!p) {
            violation("kGUARD_EXC_INVALID_NAME: release of %#x, which names nothing", name);
            code = KERN_INVALID_NAME;
        } else if (p->own && p->references == 1) {
            violation("kGUARD_EXC_MOD_REFS: release of the last reference of thread port %#x", name);
            code = KERN_INVALID_CAPABILITY; /* ipc_right_dealloc, osfmk/ipc/ipc_right.c:1147 */
        } else
            drop_reference(p);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

int mach_port_get_refs(uint32_t task, uint32_t name, uint32_t right, uint32_t *references)
{
    (void)task;
    pthread_mutex_lock(&lock);
    struct port *p = port_named(name);
    int code = !p && name != HOST_SELF ? KERN_INVALID_NAME : KERN_SUCCESS;
    if (name == HOST_SELF)
        *references = right == 0 ? host_references : 0;
    else if (p)
        *references = (right == 0) == !p->dead ? p->references : 0;
    pthread_mutex_unlock(&lock);
    return code;
}

int mach_port_space_basic_info(uint32_t task, uint32_t info[6])
{
    (void)task;
    pthread_mutex_lock(&lock);
    refresh();
    memset(info, 0, 24);
    info[1] = port_room + first_index;
    info[3] = ports_used + 3; /* task, host, reply port */
    pthread_mutex_unlock(&lock);
    return KERN_SUCCESS;
}

/* User references beyond those of libpthread and other libraries: 0 unless one was not released. */
long sim_references_owed(void)
{
    pthread_mutex_lock(&lock);
    long owed = host_references - 1;
    for (uint32_t i = 0; i < port_room; i++)
        if (ports[i].used)
            owed += ports[i].references - ports[i].own;
    pthread_mutex_unlock(&lock);
    return owed;
}

/* Copies the reply if `count` words have room for it, and writes the count back. */
static int reply(void *out, uint32_t *count, const void *info, uint32_t words, bool short_)
{
    if (*count < words)
        return KERN_INVALID_ARGUMENT;
    *count = short_ ? words - 1 : words;
    memcpy(out, info, *count * 4);
    return KERN_SUCCESS;
}

int thread_info(uint32_t port, uint32_t flavor, void *out, uint32_t *count)
{
    pthread_mutex_lock(&lock);
    long injected = fault("thread_info", (int)flavor);
    int code = injected == SHORT_REPLY ? 0 : (int)injected;
    struct port *p = port_named(port);
    struct thread *t = p ? p->thread : NULL;
    int priority = 31;
    if (!code && !t)
        code = MACH_SEND_INVALID_DEST;
    if (!code && t->dying)
        code = t->kind == 3 ? KERN_INVALID_ARGUMENT : KERN_TERMINATED;
    if (!code && flavor == 5 && !read_thread(t, &priority)) {
        die(t);
        disable_port(t);
        code = MACH_SEND_INVALID_DEST;
    }
    if (!code && flavor == 5) {
        struct thread_extended_info info = extended_info(t, priority);
        code = reply(out, count, &info, 28, injected == SHORT_REPLY);
    } else if (!code && flavor == 4) {
        uint64_t info[3] = {t->id, 0x7000000000 + t->id, 0};
        code = reply(out, count, info, 6, injected == SHORT_REPLY);
    } else if (!code)
        code = KERN_INVALID_ARGUMENT;
    pthread_mutex_unlock(&lock);
    return code;
}

static void memory(long pid, unsigned long long *vm, unsigned long long *rss, unsigned long long *anonymous)
{
    char path[64], text[128];
    unsigned long long pages[3] = {0};
    snprintf(path, sizeof path, "/proc/%ld/statm", pid);
    if (read_file(path, text, sizeof text))
        sscanf(text, "%llu %llu %llu", &pages[0], &pages[1], &pages[2]);
    *vm = pages[0] * 4096;
    *rss = pages[1] * 4096;
    *anonymous = (pages[1] - pages[2]) * 4096;
}

static void totals_in_ticks(struct totals totals, struct stat_line *s, uint64_t out[4])
{
    long long user, system;
    split(totals.total, s->utime, s->stime, &user, &system);
    out[0] = ticks(user);
    out[1] = ticks(totals.total) - out[0];
    split(totals.living, s->utime, s->stime, &user, &system);
    out[2] = ticks(user);
    out[3] = ticks(totals.living) - out[2];
}

int task_info(uint32_t task, uint32_t flavor, void *out, uint32_t *count)
{
    pthread_mutex_lock(&lock);
    long injected = fault("task_info", (int)flavor);
    int code = injected == SHORT_REPLY ? 0 : (int)injected;
    bool short_ = injected == SHORT_REPLY;
    if (!code && task != TASK_SELF)
        code = MACH_SEND_INVALID_DEST;
    struct stat_line s = {0};
    unsigned long long vm, rss, anonymous;
    if (!code && flavor <= 2)
        read_stat("/proc/self/stat", &s);
    if (!code && flavor >= 20)
        memory(getpid(), &vm, &rss, &anonymous);
    if (!code && flavor == 1) { /* TASK_ABSOLUTETIME_INFO */
        uint64_t info[4];
        totals_in_ticks(refresh(), &s, info);
        code = reply(out, count, info, 8, short_);
    } else if (!code && flavor == 2) { /* TASK_EVENTS_INFO */
        int32_t info[8] = {(int32_t)(s.minflt + s.majflt), (int32_t)s.majflt};
        code = reply(out, count, info, 8, short_);
    } else if (!code && flavor == 20) { /* MACH_TASK_BASIC_INFO: its times are the exited threads' only */
        struct totals totals = refresh();
        struct rusage usage;
        getrusage(RUSAGE_SELF, &usage);
        long long us = (totals.total - totals.living) / 1000;
        struct {
            uint64_t virtual_size, resident_size, resident_size_max;
            int32_t user[2], system[2], policy, suspend_count;
        } info = {vm, rss, usage.ru_maxrss * 1024ULL, {(int32_t)(us / 1000000), (int32_t)(us % 1000000)}, {0}, 1, 0};
        code = reply(out, count, &info, 12, short_);
    } else if (!code && flavor == 22) { /* TASK_VM_INFO: as many revisions as there is room for */
        uint64_t info[19] = {vm, 4096ULL << 32, rss, rss};
        info[18] = anonymous;
        if (*count > 93)
            violation("TASK_VM_INFO with room for %u words: macOS 15 logs each such call", *count);
        code = reply(out, count, info, *count >= 38 ? 38 : 36, short_);
    } else if (!code)
        code = KERN_INVALID_ARGUMENT;
    pthread_mutex_unlock(&lock);
    return code;
}

char *mach_error_string(int code)
{
    switch (code) {
    case KERN_SUCCESS: return "(os/kern) successful";
    case KERN_INVALID_ARGUMENT: return "(os/kern) invalid argument";
    case 5: return "(os/kern) failure";
    case 6: return "(os/kern) resource shortage";
    case KERN_INVALID_NAME: return "(os/kern) invalid name";
    case KERN_INVALID_TASK: return "(os/kern) invalid task";
    case KERN_INVALID_CAPABILITY: return "(os/kern) invalid capability";
    case KERN_TERMINATED: return "(os/kern) object terminated";
    case MACH_SEND_INVALID_DEST: return "(ipc/send) invalid destination port";
    default: return "unknown error code";
    }
}

/* The machine [11] */

static long long memory_pages[4] = {-1}, pressure_level = 1;
static char hidden_sysctl[64];
static const long long page_bytes = 16384;

/* Pages that are free, speculative, of files, and purgeable, from now on. */
void sim_memory(long long free_, long long speculative, long long external, long long purgeable)
{
    long long pages[4] = {free_, speculative, external, purgeable};
    memcpy(memory_pages, pages, sizeof pages);
}

void sim_pressure_level(long long level) { pressure_level = level; }

/* From now on there is no variable of this name. */
void sim_hide_sysctl(const char *name) { snprintf(hidden_sysctl, sizeof hidden_sysctl, "%s", name); }

static long long number_after(const char *text, const char *label)
{
    const char *at = strstr(text, label);
    return at ? strtoll(at + strlen(label), NULL, 10) : 0;
}

/* Ticks of 1/100 s by state. XNU counts nice time as user time, and that of interrupts as the system's. */
int host_processor_info(uint32_t host, int flavor, uint32_t *processors, uint32_t **array, uint32_t *count)
{
    static char text[65536];
    pthread_mutex_lock(&lock);
    int code = (int)fault("host_processor_info", flavor);
    bool short_ = code == SHORT_REPLY;
    code = short_ ? 0 : code;
    if (!code && (host != HOST_SELF || host_references <= 1))
        code = MACH_SEND_INVALID_DEST;
    if (!code && flavor != 2)
        code = KERN_INVALID_ARGUMENT;
    if (!code && !read_file("/proc/stat", text, sizeof text))
        code = 5;
    if (!code) {
        uint32_t ticks_of[1024][4], n = 0;
        for (char *line = strchr(text, '\n'); line && !strncmp(line + 1, "cpu", 3) && n < 1024; line = strchr(line + 1, '\n')) {
            unsigned long long user, nice, system, idle, iowait, irq, softirq;
            if (sscanf(line, "\ncpu%*u %llu %llu %llu %llu %llu %llu %llu", &user, &nice, &system, &idle, &iowait, &irq, &softirq) != 7)
                break;
            uint32_t states[4] = {(uint32_t)(user + nice), (uint32_t)(system + irq + softirq), (uint32_t)(idle + iowait), 0};
            memcpy(ticks_of[n++], states, sizeof states);
        }
        *processors = n;
        *count = short_ ? 4 * n - 1 : 4 * n;
        *array = new_array(*count * sizeof **array);
        memcpy(*array, ticks_of, *count * sizeof **array);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

struct vm_statistics64 {
    uint32_t free_count, active_count, inactive_count, wire_count;
    uint64_t counters[9];
    uint32_t purgeable_count, speculative_count;
    uint64_t compression[4];
    uint32_t compressor_page_count, throttled_count, external_page_count, internal_page_count;
    uint64_t total_uncompressed;
};

/* All programs together get 2 to 10 answers a second, and then the last one again. */
int host_statistics64(uint32_t host, int flavor, void *out, uint32_t *count)
{
    static struct vm_statistics64 last;
    static long long window_ns, answers, most;
    char text[8192];
    pthread_mutex_lock(&lock);
    long injected = fault("host_statistics64", flavor);
    int code = injected == SHORT_REPLY ? 0 : (int)injected;
    uint32_t words = sizeof last / 4;
    if (!code && (host != HOST_SELF || host_references <= 1))
        code = MACH_SEND_INVALID_DEST;
    if (!code && flavor != 4)
        code = KERN_INVALID_ARGUMENT;
    if (!code && *count < words - 14) /* HOST_VM_INFO64_REV0_COUNT */
        code = 5;
    if (!code && *count < words)
        words -= 14;
    if (!code) {
        long long now = clock_ns(CLOCK_BOOTTIME);
        bool repeats = window_ns && now - window_ns < 1000000000 && answers >= most;
        if (!window_ns || now - window_ns >= 1000000000) {
            window_ns = now;
            answers = 0;
            most = 2 + now % 9;
        }
        answers++;
        if (!repeats && read_file("/proc/meminfo", text, sizeof text)) {
            long long kib = page_bytes / 1024;
            bool made_up = memory_pages[0] >= 0;
            long long speculative = made_up ? memory_pages[1] : number_after(text, "Inactive(file):") / kib / 4;
            last = (struct vm_statistics64){
                .free_count = (uint32_t)((made_up ? memory_pages[0] : number_after(text, "MemFree:") / kib) + speculative),
                .speculative_count = (uint32_t)speculative,
                .external_page_count = (uint32_t)(made_up ? memory_pages[2]
                    : (number_after(text, "Active(file):") + number_after(text, "Inactive(file):")) / kib),
                .purgeable_count = (uint32_t)(made_up ? memory_pages[3] : 0),
                .internal_page_count = (uint32_t)(number_after(text, "AnonPages:") / kib),
            };
        }
        *count = injected == SHORT_REPLY ? words - 1 : words;
        memcpy(out, &last, *count * 4);
    }
    pthread_mutex_unlock(&lock);
    return code;
}

/* libproc [3, 7] */

static struct {
    long pid;
    long long exited_ns, start_shift_s, execs, died_ns, wait_ns, reaped_ns;
    bool lived;
} others[256];
static long caller_euid = -1;
static int newest_rusage = 6;
static long long teardown_ns;

/* How long the kernel frees what a process had, between the first ESRCH and NOTE_EXIT [8]. */
void sim_teardown(long long ns) { teardown_ns = ns; }

/* Judge permission as if our effective user were this one (-1: as it is). */
void sim_caller_euid(long euid) { caller_euid = euid; }
void sim_newest_rusage(int flavor) { newest_rusage = flavor; }

static int other(long pid)
{
    for (int i = 0; i < 256; i++)
        if (others[i].pid == pid || !others[i].pid) {
            others[i].pid = pid;
            return i;
        }
    memset(others, 0, sizeof others);
    others[0].pid = pid;
    return 0;
}

/* From now on the pid belongs to a process that started this much later. */
void sim_reuse_pid(long pid, long long seconds) { others[other(pid)].start_shift_s += seconds; }
void sim_exec(long pid) { others[other(pid)].execs++; }

/* The threads of the process have waited this much longer for a CPU. */
void sim_wait(long pid, long long ns) { others[other(pid)].wait_ns += ns; }

/* The process has waited for children that used this much more CPU time. */
void sim_reap(long pid, long long ns) { others[other(pid)].reaped_ns += ns; }

static long long runnable_lag_ns;

/* How far the runnable time is behind the CPU time, without a wait: of a thread that runs, within its quantum [3]. */
void sim_runnable_lag(long long ns) { runnable_lag_ns = ns; }

struct proc_bsdinfo {
    uint32_t flags, status, xstatus, pid, ppid, uid, gid, ruid, rgid, svuid, svgid, rfu;
    char comm[16], name[32];
    uint32_t nfiles, pgid, pjobc, tdev, tpgid;
    int32_t nice;
    uint64_t start_s, start_us;
};

struct proc_taskinfo {
    uint64_t vm, rss, times[4];
    int32_t policy, faults, pageins, cow, sent, received, mach, unix_, csw, threads, running, priority;
};

/* Processor time of another process, ns. What its exited threads used is known up to a tick per running thread. */
static struct totals other_totals(long pid, struct stat_line *s)
{
    static uint64_t *ids;
    static long room;
    char path[64], text[64];
    long long total = clock_ns((clockid_t)(~(unsigned)pid << 3 | 2)), living = 0, slack = 5000000;
    snprintf(path, sizeof path, "/proc/%ld/task", pid);
    long n = list_numbers(path, &ids, &room);
    for (long i = 0; i < n; i++) {
        thread_path(path, sizeof path, pid, ids[i], "schedstat");
        if (read_file(path, text, sizeof text))
            living += strtoll(text, NULL, 10);
        slack += 4000000 * (s->state == 'R');
    }
    long long *exited = &others[other(pid)].exited_ns;
    if (total - living > *exited + slack)
        *exited = total - living;
    return (struct totals){total, total - *exited};
}

/* Time for which the living threads were runnable and did not run, ns; XNU keeps that of exited threads as well. */
static long long waited_ns(long pid)
{
    static uint64_t *ids;
    static long room;
    char path[64], text[64];
    long long waited = 0;
    snprintf(path, sizeof path, "/proc/%ld/task", pid);
    long n = list_numbers(path, &ids, &room);
    for (long i = 0; i < n; i++) {
        thread_path(path, sizeof path, pid, ids[i], "schedstat");
        char *second = read_file(path, text, sizeof text) ? strchr(text, ' ') : NULL;
        waited += second ? strtoll(second, NULL, 10) : 0;
    }
    return waited;
}

static void bsd_info(long pid, struct stat_line *s, uint32_t uid, struct proc_bsdinfo *b)
{
    long long start_us = boot_wall_ns / 1000 + (long long)s->start * 10000;
    *b = (struct proc_bsdinfo){
        .flags = 0x10, .status = s->state == 'Z' && s->threads <= 1 ? 5 : s->state == 'T' || s->state == 't' ? 4 : 2,
        .pid = (uint32_t)pid, .ppid = (uint32_t)s->ppid, .uid = uid, .ruid = uid, .svuid = uid,
        .nfiles = 16, .start_s = start_us / 1000000 + others[other(pid)].start_shift_s, .start_us = start_us % 1000000,
    };
    snprintf(b->comm, sizeof b->comm, "%.15s", s->comm);
    snprintf(b->name, sizeof b->name, "%.31s", s->comm);
}

struct vnode_info_path {
    uint32_t dev;
    uint16_t mode, nlink;
    uint64_t ino;
    uint32_t uid, gid;
    int64_t times[8], size, blocks;
    int32_t block_size;
    uint32_t flags, generation, rdev;
    int64_t spare[2];
    int32_t type, pad, fsid[2];
    char path[PATH_ROOM];
};

/* Fill in path and attributes; return 0 or an errno [3]. */
static long current_directory(long pid, struct vnode_info_path *directory)
{
    static uint64_t *ids;
    static long room;
    char link[64], target[4097];
    struct stat st;
    ssize_t length = -1;
    snprintf(link, sizeof link, "/proc/%ld/task", pid);
    long n = list_numbers(link, &ids, &room), error = ESRCH;
    /* Linux: a main thread that has ended has no directory any more, its siblings have; on XNU the process has it. */
    for (long i = 0; i < n && length < 0; i++) {
        thread_path(link, sizeof link, pid, ids[i], "cwd");
        length = readlink(link, target, sizeof target - 1);
        if (length < 0 && errno == EACCES)
            error = EPERM;
    }
    if (length < 0 || stat(link, &st))
        return error;
    target[length] = 0;
    /* Linux marks a directory that was removed; XNU still has its name in the cache. */
    char *mark = length > 10 ? target + length - 10 : target;
    if (st.st_nlink == 0 && !strcmp(mark, " (deleted)"))
        *mark = 0;
    /* XNU writes the names from the last one to the first, until one does not fit. */
    char *tail = target;
    while (tail && strlen(tail) >= PATH_ROOM)
        tail = strchr(tail + 1, '/');
    *directory = (struct vnode_info_path){
        .dev = (uint32_t)st.st_dev, .mode = (uint16_t)st.st_mode, .nlink = (uint16_t)st.st_nlink, .ino = st.st_ino,
        .uid = st.st_uid, .gid = st.st_gid, .size = st.st_size, .blocks = st.st_blocks,
        .block_size = (int32_t)st.st_blksize, .type = 2,
    };
    snprintf(directory->path, sizeof directory->path, "%s", tail ? tail : "");
    return 0;
}

/*
 * Linux ends the threads of a process one by one, each giving back its memory before it leaves the list. In XNU the
 * process is first, and libproc no longer finds it [8].
 */
static bool all_threads_end(long pid)
{
    static uint64_t *ids;
    static long room;
    struct stat_line s;
    char path[64];
    snprintf(path, sizeof path, "/proc/%ld/task", pid);
    long n = list_numbers(path, &ids, &room);
    for (long i = 0; i < n; i++) {
        thread_path(path, sizeof path, pid, ids[i], "stat");
        if (read_stat(path, &s) && !s.ending)
            return false;
    }
    return true;
}

/* ESRCH: there is none; ECHILD: it is a zombie; EBUSY: it is exiting. */
static long find_process(long pid, struct stat_line *s, uint32_t *uid)
{
    char path[64];
    struct stat st;
    snprintf(path, sizeof path, "/proc/%ld", pid);
    if (pid <= 0 || stat(path, &st))
        return ESRCH;
    *uid = st.st_uid;
    snprintf(path, sizeof path, "/proc/%ld/stat", pid);
    if (!read_stat(path, s))
        return ESRCH;
    /* Linux: a dead main thread with living siblings is a 'Z' that is no dead process. */
    if (s->state == 'Z' && s->threads <= 1)
        return ECHILD;
    return s->ending && all_threads_end(pid) ? EBUSY : 0;
}

/*
 * From the moment a process has no reference for proc_find, until its knotes fire, its memory and descriptors are
 * freed: libproc reports ESRCH, PROC_PIDT_SHORTBSDINFO with arg 1 finds it with P_LEXIT and not yet SZOMB [8].
 */
static bool is_exiting(long pid, long gone)
{
    int i = other(pid);
    if (!gone) {
        others[i].lived = true;
        others[i].died_ns = 0;
        return false;
    }
    long long now = clock_ns(CLOCK_MONOTONIC);
    if (!others[i].died_ns)
        others[i].died_ns = now;
    return others[i].lived && (gone == EBUSY || now - others[i].died_ns < teardown_ns);
}

static bool may_read(uint32_t uid)
{
    long caller = caller_euid < 0 ? (long)geteuid() : caller_euid;
    return caller == 0 || caller == (long)uid;
}

static struct thread_extended_info *other_thread(long pid, uint64_t tid)
{
    static struct thread_extended_info info;
    struct stat_line s;
    char path[64], text[64];
    long long user, system;
    thread_path(path, sizeof path, pid, tid, "stat");
    if (!read_stat(path, &s) || s.state == 'X')
        return NULL;
    thread_path(path, sizeof path, pid, tid, "schedstat");
    if (!read_file(path, text, sizeof text))
        return NULL;
    split(strtoll(text, NULL, 10), s.utime, s.stime, &user, &system);
    info = (struct thread_extended_info){
        .user_time = to_us(user), .system_time = to_us(system), .curpri = (int)s.priority, .priority = (int)s.priority,
        .run_state = run_state(s.state),
    };
    snprintf(info.name, sizeof info.name, "%s", is_unnamed(s.comm, pid) ? "" : s.comm);
    return &info;
}

/* Bytes written, or -errno. */
static long pidinfo(long pid, int flavor, uint64_t arg, void *buffer, long size)
{
    static uint64_t *ids;
    static long room;
    struct stat_line s;
    uint32_t uid = 0;
    char path[64];
    struct proc_bsdinfo bsd;
    long gone = find_process(pid, &s, &uid);
    bool finds_zombies = arg == 1 && (flavor == 13 || flavor == 17);
    bool exiting = is_exiting(pid, gone);
    if (gone && !(finds_zombies && (exiting || gone == ECHILD)))
        return -ESRCH;
    bool of_any_user = flavor == 13 || flavor == 17;
    if (!of_any_user && !may_read(uid))
        return -EPERM;
    bsd_info(pid, &s, uid, &bsd);
    if (exiting) {
        bsd.status = 2;
        bsd.flags |= 4; /* PROC_FLAG_INEXIT */
    }
    if (flavor == 2) { /* PROC_PIDTASKALLINFO */
        struct { struct proc_bsdinfo bsd; struct proc_taskinfo task; } all = {.bsd = bsd};
        unsigned long long anonymous, vm, rss;
        if (size < (long)sizeof all)
            return -ENOMEM;
        memory(pid, &vm, &rss, &anonymous);
        all.task.vm = vm;
        all.task.rss = rss;
        totals_in_ticks(pid == getpid() ? refresh() : other_totals(pid, &s), &s, all.task.times);
        all.task.faults = (int32_t)(s.minflt + s.majflt);
        all.task.pageins = (int32_t)s.majflt;
        all.task.threads = pid == getpid() ? (int32_t)thread_count : (int32_t)s.threads;
        memcpy(buffer, &all, sizeof all);
        return sizeof all;
    }
    if (flavor == 13) { /* PROC_PIDT_SHORTBSDINFO */
        struct { uint32_t pid, ppid, pgid, status; char comm[16]; uint32_t rest[8]; } brief = {(uint32_t)pid, 0, 0, bsd.status, {0}, {bsd.flags, uid}};
        if (size < (long)sizeof brief)
            return -ENOMEM;
        memcpy(brief.comm, bsd.comm, 16);
        memcpy(buffer, &brief, sizeof brief);
        return sizeof brief;
    }
    if (flavor == 17) { /* PROC_PIDUNIQIDENTIFIERINFO */
        struct { uint8_t uuid[16]; uint64_t unique, parent; int32_t version, parent_version; uint64_t rest[2]; } unique = {0};
        if (size < (long)sizeof unique)
            return -ENOMEM;
        unique.unique = (uint64_t)pid << 32 | s.start;
        unique.version = (int32_t)(s.image ^ s.image >> 32) + (int32_t)others[other(pid)].execs;
        memcpy(buffer, &unique, sizeof unique);
        return sizeof unique;
    }
    if (flavor == 9) { /* PROC_PIDVNODEPATHINFO */
        struct { struct vnode_info_path current, root; } directories = {0};
        if (size < (long)sizeof directories)
            return -ENOMEM;
        long error = current_directory(pid, &directories.current);
        if (error)
            return -error;
        memcpy(buffer, &directories, sizeof directories);
        return sizeof directories;
    }
    if (flavor == 28) { /* PROC_PIDLISTTHREADIDS: at most 10 more than there were before the lock */
        if (size < 8)
            return -ENOMEM;
        long limit = size / 8, n = 0;
        if (pid == getpid()) {
            for (struct thread *t = threads; t; t = t->next)
                t->lists_left -= t->dying;
            long before = thread_count;
            refresh();
            limit = limit < before + 10 ? limit : before + 10;
            for (struct thread *t = threads; t && n < limit; t = t->next)
                ((uint64_t *)buffer)[n++] = t->id;
            return n * 8;
        }
        limit = limit < (long)s.threads + 10 ? limit : (long)s.threads + 10;
        snprintf(path, sizeof path, "/proc/%ld/task", pid);
        n = list_numbers(path, &ids, &room);
        if (n <= 0)
            return -ESRCH;
        n = n < limit ? n : limit;
        memcpy(buffer, ids, n * 8);
        return n * 8;
    }
    if (flavor == 15) { /* PROC_PIDTHREADID64INFO */
        struct thread_extended_info *info = NULL, own;
        if (size < 112)
            return -ENOMEM;
        if (pid == getpid()) {
            for (int listed = 0; listed < 2 && !info; listed++) {
                if (listed)
                    refresh(); /* it may have started since the last list of threads */
                for (struct thread *t = threads; t; t = t->next) {
                    int priority = 31;
                    if (t->id != arg)
                        continue;
                    if (!t->dying && !read_thread(t, &priority))
                        die(t);
                    own = extended_info(t, priority);
                    info = &own;
                }
            }
        } else
            info = other_thread(pid, arg);
        if (!info)
            return -ESRCH;
        memcpy(buffer, info, sizeof *info);
        return sizeof *info;
    }
    if (flavor == 1) { /* PROC_PIDLISTFDS */
        snprintf(path, sizeof path, "/proc/%ld/fd", pid);
        long n = list_numbers(path, &ids, &room);
        if (n < 0)
            return -EPERM;
        if (!buffer)
            return (n + 20) * 8;
        n = n < size / 8 ? n : size / 8;
        for (long i = 0; i < n; i++)
            ((uint64_t *)buffer)[i] = ids[i] | 1ULL << 32;
        return n * 8;
    }
    return -EINVAL;
}

int proc_pidinfo(int pid, int flavor, uint64_t arg, void *buffer, int size)
{
    pthread_mutex_lock(&lock);
    long injected = fault("proc_pidinfo", flavor), result;
    if (injected > 0)
        result = -injected;
    else {
        result = pidinfo(pid, flavor, arg, buffer, size);
        if (injected == SHORT_REPLY && result > 4)
            result -= 4;
        if (injected == NO_PATH && flavor == 9 && result > 0)
            memset(((struct vnode_info_path *)buffer)->path, 0, PATH_ROOM);
    }
    pthread_mutex_unlock(&lock);
    if (result < 0) {
        errno = (int)-result;
        return 0;
    }
    return (int)result;
}

/* Writes all of the flavor: the kernel does not know how much room there is [3]. */
static const int rusage_sizes[] = {96, 144, 160, 232, 296, 304, 464};

static long pid_rusage(long pid, int flavor, uint64_t *out)
{
    struct stat_line s;
    uint32_t uid = 0;
    char path[64], text[4096];
    uint64_t info[58] = {0}, times[4];
    unsigned long long vm, rss, anonymous;
    long gone = find_process(pid, &s, &uid);
    if (gone == ESRCH)
        return ESRCH;
    if (!may_read(uid))
        return EPERM;
    if (flavor < 0 || flavor > newest_rusage)
        return EINVAL;
    totals_in_ticks(pid == getpid() ? refresh() : other_totals(pid, &s), &s, times);
    memory(pid, &vm, &rss, &anonymous);
    long long start_ns = (long long)s.start * 10000000 + others[other(pid)].start_shift_s * 1000000000 - boot_sleep_ns;
    info[2] = times[0];
    info[3] = times[1];
    snprintf(path, sizeof path, "/proc/%ld/status", pid);
    if (read_file(path, text, sizeof text)) {
        char *switches = strstr(text, "\nvoluntary_ctxt_switches:");
        info[4] = switches ? strtoull(switches + 25, NULL, 10) / 2 : 0;
        info[5] = switches ? strtoull(switches + 25, NULL, 10) : 0;
    }
    info[6] = s.majflt;
    info[8] = rss;
    info[9] = gone ? 0 : anonymous;
    info[10] = ticks(start_ns);
    info[11] = gone ? ticks(clock_ns(CLOCK_MONOTONIC)) : 0;
    /* Of children that were waited for; of a zombie, the final times [3]. */
    info[12] = ticks((long long)s.cutime * 10000000 + others[other(pid)].reaped_ns);
    info[13] = ticks((long long)s.cstime * 10000000);
    long long runnable = (long long)((info[2] + info[3]) * 125 / 3);
    info[36] = ticks(runnable_lag_ns ? runnable - runnable_lag_ns : runnable + waited_ns(pid) + others[other(pid)].wait_ns);
    info[20] = times[0] + times[1];
    info[30] = info[9];
    info[38] = times[0] * 3 / 4;
    info[39] = times[1] * 3 / 4;
    info[42] = (times[0] + times[1]) * 40; /* about 1 W */
    memcpy(out, info, rusage_sizes[flavor]);
    return 0;
}

int proc_pid_rusage(int pid, int flavor, void *buffer)
{
    pthread_mutex_lock(&lock);
    long error = fault("proc_pid_rusage", flavor);
    if (!error)
        error = pid_rusage(pid, flavor, buffer);
    pthread_mutex_unlock(&lock);
    errno = error ? (int)error : errno;
    return error ? -1 : 0;
}

static long pid_estimate = -1;

/* What proc_listallpids says without a buffer: too little, if many processes are born meanwhile. */
void sim_pid_estimate(long pids) { pid_estimate = pids; }

int proc_listallpids(void *buffer, int size)
{
    static uint64_t *ids;
    static long room;
    pthread_mutex_lock(&lock);
    long error = fault("proc_listallpids", -1), n = list_numbers("/proc", &ids, &room);
    if (error) {
        errno = (int)error;
        n = 0;
    } else if (!buffer)
        n = pid_estimate < 0 ? n + 20 : pid_estimate;
    else {
        n = n < size / 4 ? n : size / 4;
        for (long i = 0; i < n; i++)
            ((int32_t *)buffer)[i] = (int32_t)ids[i];
    }
    pthread_mutex_unlock(&lock);
    return (int)n;
}

/* Children, also zombies and those of other users; at most as many as there is room for [7]. */
int proc_listchildpids(int parent, void *buffer, int size)
{
    static uint64_t *ids;
    static long room;
    struct stat_line s;
    char path[64];
    pthread_mutex_lock(&lock);
    int saved = errno;
    long error = fault("proc_listchildpids", -1), n = list_numbers("/proc", &ids, &room), found = 0;
    if (!error && buffer && size < 4)
        error = ENOMEM;
    for (long i = 0; !error && buffer && i < n && found < size / 4; i++) {
        snprintf(path, sizeof path, "/proc/%llu/stat", (unsigned long long)ids[i]);
        if (read_stat(path, &s) && (long)s.ppid == parent)
            ((int32_t *)buffer)[found++] = (int32_t)ids[i];
    }
    pthread_mutex_unlock(&lock);
    errno = error ? (int)error : saved; /* the kernel sets it for an error only */
    if (error)
        return 0;
    return (int)(buffer ? found : n + 20);
}

int gethostuuid(unsigned char *uuid, const struct timespec *wait)
{
    (void)wait;
    pthread_mutex_lock(&lock);
    long error = fault("gethostuuid", -1);
    pthread_mutex_unlock(&lock);
    if (error) {
        errno = (int)error;
        return -1;
    }
    memset(uuid, 0x5a, 16);
    return 0;
}

/* Bytes of the answer, or -errno: argc, the executable's path, its alignment, the words, the environment. */
static long procargs2(long pid, char *old, size_t room)
{
    static char answer[4 + ARGUMENTS_MAX];
    struct stat_line s;
    uint32_t uid = 0;
    char path[64];
    if (room <= 4 || room - 4 > ARGUMENTS_MAX || find_process(pid, &s, &uid) || !may_read(uid))
        return -EINVAL;
    snprintf(path, sizeof path, "/proc/%ld/exe", pid);
    ssize_t length = readlink(path, answer + 4, 4096);
    if (length < 0)
        return -EINVAL;
    long end = 4 + length;
    do
        answer[end++] = 0;
    while (end % 8 != 4);
    int32_t words = 0;
    for (int part = 0; part < 2; part++) {
        snprintf(path, sizeof path, "/proc/%ld/%s", pid, part ? "environ" : "cmdline");
        int file = open(path, O_RDONLY | O_CLOEXEC);
        long begin = end;
        while (file >= 0 && (length = read(file, answer + end, sizeof answer - end)) > 0)
            end += length;
        close(file);
        for (long i = begin; !part && i < end; i++)
            words += !answer[i];
    }
    memcpy(old, &words, 4);
    /* Where there is less room than that, the end of it is what is copied. */
    long copied = (size_t)end < room ? end - 4 : (long)room - 4;
    memcpy(old + 4, answer + end - copied, copied);
    return copied + 4;
}

int sysctl(int *oid, unsigned length, void *old, size_t *size, void *new, size_t new_size)
{
    (void)new, (void)new_size;
    pthread_mutex_lock(&lock);
    long result = -fault("sysctl", -1);
    if (!result)
        result = length == 3 && oid[0] == 1 && oid[1] == 49 ? procargs2(oid[2], old, *size) : -ENOENT;
    pthread_mutex_unlock(&lock);
    if (result < 0) {
        errno = (int)-result;
        return -1;
    }
    *size = result;
    return 0;
}

int sysctlbyname(const char *name, void *old, size_t *size, const void *new, size_t new_size)
{
    (void)new, (void)new_size;
    char text[64] = {0}, file[8192];
    size_t length = 0;
    pthread_mutex_lock(&lock);
    long error = fault("sysctlbyname", -1);
    pthread_mutex_unlock(&lock);
    if (!error && !strcmp(name, hidden_sysctl))
        error = ENOENT;
    if (error)
        ;
    else if (!strcmp(name, "hw.tbfrequency") && frequency_stated) {
        memcpy(text, &frequency_stated, length = 8);
    } else if (!strcmp(name, "hw.nperflevels") && perf_levels) {
        memcpy(text, &perf_levels, length = 4);
    } else if (!strcmp(name, "hw.ncpu")) {
        int32_t processors = (int32_t)sysconf(_SC_NPROCESSORS_ONLN);
        memcpy(text, &processors, length = 4);
    } else if (!strcmp(name, "hw.memsize") && read_file("/proc/meminfo", file, sizeof file)) {
        long long bytes = number_after(file, "MemTotal:") * 1024;
        memcpy(text, &bytes, length = 8);
    } else if (!strcmp(name, "kern.memorystatus_vm_pressure_level")) {
        memcpy(text, &pressure_level, length = 4);
    } else if (!strcmp(name, "vm.loadavg") && read_file("/proc/loadavg", file, sizeof file)) {
        double load[3] = {0};
        sscanf(file, "%lf %lf %lf", &load[0], &load[1], &load[2]);
        struct { uint32_t average[3]; int64_t scale; } loads = {.scale = 2048}; /* FSCALE */
        for (int i = 0; i < 3; i++)
            loads.average[i] = (uint32_t)(load[i] * 2048);
        memcpy(text, &loads, length = sizeof loads);
    } else if (!strcmp(name, "vm.swapusage") && read_file("/proc/meminfo", file, sizeof file)) {
        long long total = number_after(file, "SwapTotal:") * 1024, free_ = number_after(file, "SwapFree:") * 1024;
        struct { uint64_t total, available, used; uint32_t page_size, encrypted; } swap = {
            (uint64_t)total, (uint64_t)free_, (uint64_t)(total - free_), (uint32_t)page_bytes, 1};
        memcpy(text, &swap, length = sizeof swap);
    } else if (!strcmp(name, "kern.bootsessionuuid") && read_file("/proc/sys/kernel/random/boot_id", text, sizeof text)) {
        text[36] = 0;
        length = 37;
    } else
        error = ENOENT;
    if (!error && old && *size < length)
        error = ENOMEM;
    if (!error) {
        if (old)
            memcpy(old, text, length);
        *size = length;
    }
    errno = error ? (int)error : errno;
    return error ? -1 : 0;
}

/* For the benchmark */

int sim_nothing(uint32_t a, uint32_t b, void *c, uint32_t *d)
{
    (void)a, (void)b, (void)c, (void)d;
    return 0;
}

/* What the calls of a snapshot cost in C, ns: the list, the totals, per thread two readings and a release, the sizes. */
long long sim_cost_in_c(void)
{
    static struct thread_extended_info info;
    uint64_t identifier[3];
    uint32_t *list, count, words;
    long long begun = clock_ns(CLOCK_MONOTONIC);
    task_threads(TASK_SELF, &list, &count);
    words = 8;
    task_info(TASK_SELF, 1, &info, &words);
    for (uint32_t i = 0; i < count; i++) {
        words = 28;
        thread_info(list[i], 5, &info, &words);
        words = 6;
        thread_info(list[i], 4, identifier, &words);
        mach_port_deallocate(TASK_SELF, list[i]);
    }
    vm_deallocate(TASK_SELF, (uintptr_t)list, count * 4);
    words = 12;
    task_info(TASK_SELF, 20, &info, &words);
    return clock_ns(CLOCK_MONOTONIC) - begun;
}

long long sim_nothing_cost_in_c(long calls)
{
    int (*volatile nothing)(uint32_t, uint32_t, void *, uint32_t *) = sim_nothing;
    long long begun = clock_ns(CLOCK_MONOTONIC);
    for (long i = 0; i < calls; i++)
        nothing(1, 2, &begun, NULL);
    return clock_ns(CLOCK_MONOTONIC) - begun;
}
