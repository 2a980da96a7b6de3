/* Between a process and the C library: numbers the calls that change files below one directory, and
 * at a chosen one kills the process or lets it fail, as a full or broken disk would. Each change is
 * written to a log, from which tests/reliability/disk.py makes what a power loss would leave.
 *
 *   arm(root, mode, at, last, error, log)
 *     mode 0 counts, 1 kills before call `at`, 2 makes the calls `at` to `last` fail with `error`
 *     log  a descriptor for the changes, or -1
 *   disarm() returns how many calls there were
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static char root[4096];
static size_t root_length;
static int mode, error_number, log_to = -1, armed;
static long calls, at, last;

void arm(const char *where, int how, long from, long to, int error, int log) {
    snprintf(root, sizeof root, "%s", where);
    root_length = strlen(root);
    mode = how, at = from, last = to, error_number = error, log_to = log, calls = 0, armed = 1;
}

long disarm(void) {
    armed = 0;
    return calls;
}

static int below(const char *path) {
    return armed && path && !strncmp(path, root, root_length) && !strstr(path, "-shm");
}

static const char *path_of(int fd, char *into) {
    char link[64];
    if (!armed) return NULL;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = syscall(SYS_readlinkat, AT_FDCWD, link, into, 4095);
    if (length < 0) return NULL;
    into[length] = 0;
    return into;
}

/* One call that changes something: true when it has to fail. Out of descriptors, only opening does;
 * a full disk lets files be removed. */
static int fault(char kind) {
    if (mode == 2 && error_number == EMFILE && kind != 'o') return 0;
    if (mode == 2 && error_number == ENOSPC && kind == 'u') return 0;
    calls++;
    if (mode == 1 && calls == at) syscall(SYS_kill, getpid(), SIGKILL);
    if (mode == 2 && calls >= at && calls <= last) {
        errno = error_number;
        return 1;
    }
    return 0;
}

static void put(const void *bytes, size_t length) {
    const char *from = bytes;
    while (length) {
        ssize_t done = syscall(SYS_write, log_to, from, length);
        if (done <= 0) abort();
        from += done, length -= (size_t)done;
    }
}

/* kind, offset, lengths of the two texts and the data, then these. */
static void note(char kind, const char *one, const char *two, int64_t offset, const void *data,
                 size_t size) {
    if (log_to < 0) return;
    uint32_t head[3] = {(uint32_t)strlen(one), (uint32_t)strlen(two), (uint32_t)size};
    put(&kind, 1), put(&offset, 8), put(head, sizeof head);
    put(one, head[0]), put(two, head[1]), put(data, size);
}

void note_text(const char *text) { note('!', text, "", 0, "", 0); }

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static int opened(const char *path, int flags, mode_t permissions) {
    int changes = below(path) && (flags & (O_CREAT | O_TRUNC));
    struct stat found;
    int there = changes && stat(path, &found) == 0;
    if (below(path) && error_number == EMFILE && mode == 2 && !changes && fault('o')) return -1;
    if (changes && (!there || flags & O_TRUNC || error_number == EMFILE) && fault('o')) return -1;
    int fd = (int)syscall(SYS_openat, AT_FDCWD, path, flags, permissions);
    if (fd >= 0 && changes && !there) note('c', path, "", 0, "", 0);
    if (fd >= 0 && there && flags & O_TRUNC) note('t', path, "", 0, "", 0);
    return fd;
}

#define OPEN(name)                                                                                \
    int name(const char *path, int flags, ...) {                                                  \
        va_list rest;                                                                             \
        va_start(rest, flags);                                                                    \
        mode_t permissions = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;            \
        va_end(rest);                                                                             \
        return opened(path, flags, permissions);                                                  \
    }
OPEN(open)
OPEN(open64)

ssize_t write(int fd, const void *data, size_t size) {
    char path[4096];
    if (!below(path_of(fd, path))) return syscall(SYS_write, fd, data, size);
    if (fault('x')) return -1;
    off_t before = lseek(fd, 0, SEEK_CUR);
    ssize_t done = syscall(SYS_write, fd, data, size);
    if (done > 0) note('w', path, "", before, data, (size_t)done);
    return done;
}

ssize_t pwrite64(int fd, const void *data, size_t size, off64_t offset) {
    char path[4096];
    if (!below(path_of(fd, path))) return syscall(SYS_pwrite64, fd, data, size, offset);
    if (fault('x')) return -1;
    ssize_t done = syscall(SYS_pwrite64, fd, data, size, offset);
    if (done > 0) note('w', path, "", offset, data, (size_t)done);
    return done;
}
ssize_t pwrite(int fd, const void *data, size_t size, off_t offset) {
    return pwrite64(fd, data, size, offset);
}

static int synced(int fd, long number) {
    char path[4096];
    if (fd < 0) return (int)syscall(number, fd);
    if (!below(path_of(fd, path))) return 0; /* the log stands for the disk: why wait for a real one */
    if (fault('x')) return -1;
    note('s', path, "", 0, "", 0);
    return 0;
}
int fsync(int fd) { return synced(fd, SYS_fsync); }
int fdatasync(int fd) { return synced(fd, SYS_fdatasync); }

int ftruncate64(int fd, off64_t size) {
    char path[4096];
    if (!below(path_of(fd, path))) return (int)syscall(SYS_ftruncate, fd, size);
    if (fault('x')) return -1;
    note('t', path, "", size, "", 0);
    return (int)syscall(SYS_ftruncate, fd, size);
}
int ftruncate(int fd, off_t size) { return ftruncate64(fd, size); }

int rename(const char *from, const char *to) {
    if (!below(from)) return REAL(rename)(from, to);
    if (fault('x')) return -1;
    int done = REAL(rename)(from, to);
    if (!done) note('r', from, to, 0, "", 0);
    return done;
}

int mkdir(const char *path, mode_t permissions) {
    if (!below(path)) return REAL(mkdir)(path, permissions);
    if (fault('x')) return -1;
    int done = REAL(mkdir)(path, permissions);
    if (!done) note('d', path, "", 0, "", 0);
    return done;
}

int unlink(const char *path) {
    if (!below(path)) return REAL(unlink)(path);
    if (fault('u')) return -1;
    int done = REAL(unlink)(path);
    if (!done) note('u', path, "", 0, "", 0);
    return done;
}
