/* launch_activate_socket(3) as launch.h and xpc document it, and a free() that counts. */
#include <errno.h>
#include <stddef.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <unistd.h>

struct key {
    char name[32];
    int code, fds[8], taken;
    size_t count;
};

static struct key keys[4];
static size_t known;
static int managed;
int owed;

void stub_reset(int started_by_launchd)
{
    memset(keys, 0, sizeof keys);
    known = 0;
    owed = 0;
    managed = started_by_launchd;
}

void stub_key(const char *name, int code, const int *fds, size_t count)
{
    struct key *key = &keys[known++];
    strncpy(key->name, name, sizeof key->name - 1);
    key->code = code;
    key->count = count;
    memcpy(key->fds, fds, count * sizeof *fds);
}

int launch_activate_socket(const char *name, int **fds, size_t *count)
{
    if (!managed)
        return ESRCH;
    for (size_t i = 0; i < known; i++) {
        struct key *key = &keys[i];
        if (strcmp(key->name, name))
            continue;
        if (key->code)
            return key->code;
        if (key->taken++)
            return EALREADY;
        *fds = malloc(key->count * sizeof **fds);
        memcpy(*fds, key->fds, key->count * sizeof **fds);
        *count = key->count;
        owed++;
        return 0;
    }
    return ENOENT;
}

void stub_free(void *array)
{
    owed--;
    free(array);
}

/*
 * For a whole program: SIM_LAUNCHD="<pid> <key>=<fd>,<fd> ..." stands for the property list. launchd knows the process that
 * it started by its pid; a child of that process is a stranger.
 */
__attribute__((constructor)) static void start(void)
{
    const char *text = getenv("SIM_LAUNCHD");
    char name[32];
    int pid, fds[8], read, more;
    if (!text || sscanf(text, "%d%n", &pid, &read) != 1 || pid != getpid())
        return;
    managed = 1;
    while (sscanf(text += read, " %31[a-z]=%d%n", name, fds, &read) == 2) {
        size_t count = 1;
        for (; count < 8 && sscanf(text + read, ",%d%n", fds + count, &more) == 1; read += more)
            count++;
        stub_key(name, 0, fds, count);
    }
}
