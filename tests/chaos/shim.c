/* A file layer that fails: preloaded into `pipeline` by the chaos test.
 *
 * It counts what changes files below CHAOS_ROOT and ends the process with SIGKILL at the operation that
 * CHAOS names, "<class> <mode> <number> <power>":
 *   class  any: every operation; commit: writes to a run's manifest log, their syncs, a new manifest;
 *          other words: those on files and folders whose path below CHAOS_ROOT has these words
 *   mode   before: the operation never happens; torn: half of a write happens; after: it happens
 *   power  1: what was not synced is lost, too, as when the power fails. A file keeps what was synced of
 *          it; renames, removals and new entries of a folder last once the folder was synced.
 * At the end of a process that nothing killed, the numbers of operations, of commits and of those of the
 * class go to CHAOS_COUNT.
 * CHAOS_CLOCK=1: the clock jumps back by an hour at every operation.
 */
#define _GNU_SOURCE
#include <dirent.h>
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#define FDS 4096
#define EVENTS 65536

enum kind { CREATED, MADE_FOLDER, RENAMED, REMOVED };

/* A change of a folder's entries that is not synced. `kept`: what the entry was before. */
struct event { enum kind kind; char *path, *from, *kept; };
struct file { char *path; off_t synced; };

static pthread_mutex_t mutex = PTHREAD_RECURSIVE_MUTEX_INITIALIZER_NP;
static char *fds[FDS];
static struct event events[EVENTS];
static int event_count;
static struct file files[EVENTS];
static int file_count;
static char root[PATH_MAX], trash[PATH_MAX], class[64];
static int mode, power, is_clock; /* mode: 0 before, 1 torn, 2 after */
static long target = -1, operations, commits, of_class, trashed;

#define REAL(name, type) ((type)dlsym(RTLD_NEXT, name))

__attribute__((constructor)) static void begin(void) {
    const char *given = getenv("CHAOS_ROOT"), *plan = getenv("CHAOS");
    if (!given) return;
    snprintf(root, sizeof root, "%s", given);
    snprintf(trash, sizeof trash, "%s.trash", given);
    mkdir(trash, 0700);
    is_clock = getenv("CHAOS_CLOCK") != NULL;
    char word[16];
    if (plan && sscanf(plan, "%63s %15s %ld %d", class, word, &target, &power) == 4)
        mode = !strcmp(word, "torn") ? 1 : !strcmp(word, "after") ? 2 : 0;
}

__attribute__((destructor)) static void end(void) {
    const char *count = getenv("CHAOS_COUNT");
    if (!count || !*root) return;
    *root = 0;
    FILE *out = fopen(count, "w");
    if (out) { fprintf(out, "%ld %ld %ld\n", operations, commits, of_class); fclose(out); }
}

static int inside(const char *path) {
    size_t length = strlen(root);
    return length && path && !strncmp(path, root, length) && (path[length] == '/' || !path[length]);
}

/* The absolute path of what a call names; NULL if it is none of ours. */
static char *ours(const char *path) {
    char full[PATH_MAX];
    if (!*root || !path) return NULL;
    if (path[0] == '/') snprintf(full, sizeof full, "%s", path);
    else { if (!getcwd(full, sizeof full)) return NULL;
           size_t length = strlen(full);
           snprintf(full + length, sizeof full - length, "/%s", path); }
    /* The lock is the kernel's, and its words are for people. */
    const char *name = strrchr(full, '/');
    if (!inside(full) || !strcmp(name, "/.lock")) return NULL;
    return strdup(full);
}

static void die(void) { kill(getpid(), SIGKILL); for (;;) pause(); }

static char *trash_name(void) {
    char *name = malloc(PATH_MAX + 32);
    sprintf(name, "%s/%d-%ld", trash, getpid(), trashed++);
    return name;
}

static void power_fails(void) {
    for (int i = event_count; i-- > 0;) {
        struct event *event = &events[i];
        switch (event->kind) {
        case CREATED: REAL("unlink", int (*)(const char *))(event->path); break;
        case MADE_FOLDER: { /* it goes with all that is in it */
            char *name = trash_name();
            REAL("rename", int (*)(const char *, const char *))(event->path, name);
            break; }
        case RENAMED:
            REAL("rename", int (*)(const char *, const char *))(event->path, event->from);
            if (event->kept) REAL("rename", int (*)(const char *, const char *))(event->kept, event->path);
            break;
        case REMOVED:
            if (event->kept) REAL("rename", int (*)(const char *, const char *))(event->kept, event->path);
            break;
        }
    }
    for (int i = 0; i < file_count; i++) {
        struct stat now;
        if (!stat(files[i].path, &now) && S_ISREG(now.st_mode) && now.st_size > files[i].synced)
            if (truncate(files[i].path, files[i].synced)) {}
    }
}

/* Counts an operation on a path. Whether it is the one at which the process ends. */
static int due(const char *path, int commit) {
    operations++;
    commits += commit;
    int counts = !strcmp(class, "any") ? 1 : !strcmp(class, "commit") ? commit : strstr(path + strlen(root), class) != NULL;
    of_class += counts;
    return target >= 0 && counts && of_class == target;
}
static void strike(void) { if (power) power_fails(); die(); }

static struct file *file_at(const char *path) {
    for (int i = 0; i < file_count; i++) if (!strcmp(files[i].path, path)) return &files[i];
    if (file_count == EVENTS) die();
    struct stat now;
    files[file_count] = (struct file){ strdup(path), stat(path, &now) ? 0 : now.st_size };
    return &files[file_count++];
}
static void happened(enum kind kind, const char *path, const char *from, const char *kept) {
    if (event_count == EVENTS) die();
    events[event_count++] = (struct event){ kind, strdup(path), from ? strdup(from) : NULL, kept ? strdup(kept) : NULL };
}
/* What a folder's sync makes last. */
static void settle(const char *folder) {
    int kept = 0;
    for (int i = 0; i < event_count; i++) {
        char parent[PATH_MAX];
        snprintf(parent, sizeof parent, "%s", events[i].path);
        *strrchr(parent, '/') = 0;
        if (strcmp(parent, folder)) events[kept++] = events[i];
    }
    event_count = kept;
}
/* Keeps what is at a path, for a power loss to bring it back. */
static char *keep(const char *path) {
    struct stat now;
    if (!power || stat(path, &now) || !S_ISREG(now.st_mode)) return NULL;
    char *name = trash_name();
    if (link(path, name)) { free(name); return NULL; }
    return name;
}
static void renamed(const char *from, const char *to) {
    size_t length = strlen(from);
    for (int i = 0; i < file_count; i++) {
        if (!strcmp(files[i].path, to)) files[i].path[0] = 0; /* it is gone */
        if (!strncmp(files[i].path, from, length) && (files[i].path[length] == '/' || !files[i].path[length])) {
            char path[PATH_MAX];
            snprintf(path, sizeof path, "%s%s", to, files[i].path + length);
            files[i].path = strdup(path);
        }
    }
}

/* Whether a write to it or its sync is a commit. */
static int is_log(const char *path) {
    const char *name = strrchr(path, '/');
    size_t length = strlen(path);
    return name && !strncmp(name, "/manifest.", 10) && length > 4 && !strcmp(path + length - 4, ".log");
}

static int open_it(int folder, const char *path, int flags, mode_t permissions) {
    int (*real)(int, const char *, int, ...) = REAL("openat64", int (*)(int, const char *, int, ...));
    char *mine = folder == AT_FDCWD ? ours(path) : NULL;
    if (!mine) return real(folder, path, flags, permissions);
    pthread_mutex_lock(&mutex);
    int writes = (flags & O_ACCMODE) != O_RDONLY, fd;
    struct stat before;
    int is_new = stat(mine, &before) != 0;
    int changes = writes && ((is_new && (flags & O_CREAT)) || (flags & O_TRUNC));
    int strikes = changes && due(mine, 0);
    if (strikes && mode != 2) strike();
    fd = real(folder, path, flags, permissions);
    if (fd >= 0 && fd < FDS) {
        fds[fd] = mine;
        if (writes) {
            if (is_new) happened(CREATED, mine, NULL, NULL);
            struct file *file = file_at(mine);
            if (is_new || (flags & O_TRUNC)) file->synced = 0;
        }
    }
    if (strikes) strike();
    pthread_mutex_unlock(&mutex);
    return fd;
}
#define PERMISSIONS mode_t permissions = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list list; va_start(list, flags); permissions = va_arg(list, mode_t); va_end(list); }
int open(const char *path, int flags, ...) { PERMISSIONS return open_it(AT_FDCWD, path, flags, permissions); }
int open64(const char *path, int flags, ...) { PERMISSIONS return open_it(AT_FDCWD, path, flags, permissions); }
int openat(int folder, const char *path, int flags, ...) { PERMISSIONS return open_it(folder, path, flags, permissions); }
int openat64(int folder, const char *path, int flags, ...) { PERMISSIONS return open_it(folder, path, flags, permissions); }

int close(int fd) {
    if (fd >= 0 && fd < FDS) fds[fd] = NULL;
    return REAL("close", int (*)(int))(fd);
}

ssize_t write(int fd, const void *bytes, size_t count) {
    ssize_t (*real)(int, const void *, size_t) = REAL("write", ssize_t (*)(int, const void *, size_t));
    if (fd < 0 || fd >= FDS || !fds[fd]) return real(fd, bytes, count);
    pthread_mutex_lock(&mutex);
    int strikes = due(fds[fd], is_log(fds[fd]));
    if (strikes && mode == 1 && count > 1) real(fd, bytes, count / 2);
    if (strikes && mode != 2) strike();
    ssize_t written = real(fd, bytes, count);
    if (strikes) strike();
    pthread_mutex_unlock(&mutex);
    return written;
}
ssize_t writev(int fd, const struct iovec *pieces, int count) {
    if (fd < 0 || fd >= FDS || !fds[fd]) return REAL("writev", ssize_t (*)(int, const struct iovec *, int))(fd, pieces, count);
    for (int i = 0; i < count; i++) if (pieces[i].iov_len) return write(fd, pieces[i].iov_base, pieces[i].iov_len);
    return 0;
}
/* Fall back on read and write. */
ssize_t copy_file_range(int in, off64_t *in_at, int out, off64_t *out_at, size_t count, unsigned flags) {
    (void)in; (void)in_at; (void)out; (void)out_at; (void)count; (void)flags; errno = ENOSYS; return -1;
}
ssize_t sendfile64(int out, int in, off64_t *at, size_t count) {
    (void)in; (void)out; (void)at; (void)count; errno = ENOSYS; return -1;
}

static int sync_it(int fd, const char *name) {
    int (*real)(int) = REAL(name, int (*)(int));
    if (fd < 0 || fd >= FDS || !fds[fd]) return real(fd);
    pthread_mutex_lock(&mutex);
    int strikes = due(fds[fd], is_log(fds[fd]));
    if (strikes && mode != 2) strike();
    int done = real(fd);
    struct stat now;
    if (!done && !fstat(fd, &now)) {
        if (S_ISDIR(now.st_mode)) settle(fds[fd]);
        else file_at(fds[fd])->synced = now.st_size;
    }
    if (strikes) strike();
    pthread_mutex_unlock(&mutex);
    return done;
}
int fsync(int fd) { return sync_it(fd, "fsync"); }
int fdatasync(int fd) { return sync_it(fd, "fdatasync"); }

int ftruncate64(int fd, off64_t length) {
    int (*real)(int, off64_t) = REAL("ftruncate64", int (*)(int, off64_t));
    if (fd < 0 || fd >= FDS || !fds[fd]) return real(fd, length);
    pthread_mutex_lock(&mutex);
    int strikes = due(fds[fd], 0);
    if (strikes && mode != 2) strike();
    int done = real(fd, length);
    if (strikes) strike();
    pthread_mutex_unlock(&mutex);
    return done;
}

int rename(const char *from, const char *to) {
    int (*real)(const char *, const char *) = REAL("rename", int (*)(const char *, const char *));
    char *mine = ours(from), *target_path = ours(to);
    if (!mine || !target_path) return real(from, to);
    pthread_mutex_lock(&mutex);
    int strikes = due(target_path, !strcmp(strrchr(target_path, '/'), "/manifest.json"));
    if (strikes && mode != 2) strike();
    char *kept = keep(target_path);
    int done = real(from, to);
    if (!done) { renamed(mine, target_path); happened(RENAMED, target_path, mine, kept); }
    if (strikes) strike();
    pthread_mutex_unlock(&mutex);
    return done;
}

int unlink(const char *path) {
    int (*real)(const char *) = REAL("unlink", int (*)(const char *));
    char *mine = ours(path);
    if (!mine) return real(path);
    pthread_mutex_lock(&mutex);
    int strikes = due(mine, 0);
    if (strikes && mode != 2) strike();
    char *kept = keep(mine);
    int done = real(path);
    if (!done) happened(REMOVED, mine, NULL, kept);
    if (strikes) strike();
    pthread_mutex_unlock(&mutex);
    return done;
}

int mkdir(const char *path, mode_t permissions) {
    int (*real)(const char *, mode_t) = REAL("mkdir", int (*)(const char *, mode_t));
    char *mine = ours(path);
    if (!mine) return real(path, permissions);
    pthread_mutex_lock(&mutex);
    int strikes = due(mine, 0);
    if (strikes && mode != 2) strike();
    int done = real(path, permissions);
    if (!done && strcmp(mine, root)) happened(MADE_FOLDER, mine, NULL, NULL);
    if (strikes) strike();
    pthread_mutex_unlock(&mutex);
    return done;
}

int clock_gettime(clockid_t clock, struct timespec *time) {
    int done = REAL("clock_gettime", int (*)(clockid_t, struct timespec *))(clock, time);
    if (is_clock && clock == CLOCK_REALTIME) time->tv_sec -= 3600 * operations;
    return done;
}
