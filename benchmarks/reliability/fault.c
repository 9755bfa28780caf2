/* At the n-th write below one directory: a disk that is full or read-only from then on (full.py), or the end of the
 * process, with notes of what had been done and flushed by then (power.py). Preloaded: cc -shared -fPIC ... -ldl
 *
 * Counted are the calls that need space or a writable place: opening to create or write, mkdir, write, pwrite, fsync,
 * ftruncate, rename. Removing is noted and never fails, as on a full disk. A file that a name loses (replaced, removed)
 * keeps another one in the attic, by its inode, so that the loss can be undone.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char place[PATH_MAX];
static size_t place_length;
static long first, counted;
static int code;
static int notes = -1;
static char attic[PATH_MAX];

void fault_arm(const char *directory, long from, int number) {
    snprintf(place, sizeof place, "%s", directory);
    place_length = strlen(place);
    first = from;
    counted = 0;
    code = number;
}

void power_arm(const char *directory, long from, int file, const char *kept) {
    fault_arm(directory, from, 0);
    notes = file;
    snprintf(attic, sizeof attic, "%s", kept);
}

long fault_count(void) { return counted; }

static void note(const char *format, ...) {
    char line[3 * PATH_MAX];
    if (notes < 0) return;
    va_list rest; va_start(rest, format); int n = vsnprintf(line, sizeof line, format, rest); va_end(rest);
    syscall(SYS_write, notes, line, n);
}

static int inside(const char *path) {
    return place_length && path && strncmp(path, place, place_length) == 0 &&
           (path[place_length] == 0 || path[place_length] == '/');
}

static int inside_fd(int fd) {
    char link[64], path[PATH_MAX];
    if (!place_length) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t n = readlink(link, path, sizeof path - 1);
    if (n < 0) return 0;
    path[n] = 0;
    return inside(path);
}

static unsigned long inode(const char *path) {
    struct stat known;
    return stat(path, &known) == 0 ? known.st_ino : 0;
}

static unsigned long inode_fd(int fd) {
    struct stat known;
    return fstat(fd, &known) == 0 ? known.st_ino : 0;
}

static void keep(const char *path) {
    char kept[PATH_MAX + 32];
    struct stat known;
    if (notes < 0 || stat(path, &known) != 0 || !S_ISREG(known.st_mode)) return;
    snprintf(kept, sizeof kept, "%s/%lu", attic, known.st_ino);
    link(path, kept);
}

static void opened(int fd, const char *path, int flags, int existed) {
    if (fd < 0) return;
    if (!existed) note("create\t%s\n", path);
    else if (flags & O_TRUNC) note("cut\t%lu\t0\n", inode_fd(fd));
}

static void wrote(int fd, off_t at, ssize_t n) {
    if (n > 0 && notes >= 0) note("write\t%lu\t%ld\t%ld\n", inode_fd(fd), (long)at, (long)n);
}

static int refused(void) {
    long now = __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST);
    if (first && now >= first) {
        if (!code) kill(getpid(), SIGKILL);
        errno = code;
        return 1;
    }
    return 0;
}

#define REAL(type, name, ...) \
    static type (*real)(__VA_ARGS__); \
    if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        REAL(int, #name, const char *, int, ...); \
        if (!(flags & (O_CREAT | O_WRONLY | O_RDWR)) || !inside(path)) return real(path, flags, mode); \
        if (refused()) return -1; \
        int existed = inode(path) != 0, fd = real(path, flags, mode); \
        opened(fd, path, flags, existed); \
        return fd; \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        REAL(int, #name, int, const char *, int, ...); \
        if (!(flags & (O_CREAT | O_WRONLY | O_RDWR)) || !inside(path)) return real(at, path, flags, mode); \
        if (refused()) return -1; \
        int existed = inode(path) != 0, fd = real(at, path, flags, mode); \
        opened(fd, path, flags, existed); \
        return fd; \
    }
OPENAT(openat)
OPENAT(openat64)

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    struct stat known;
    if (!inside(path) || stat(path, &known) == 0) return real(path, mode);
    if (refused()) return -1;
    int status = real(path, mode);
    if (status == 0) note("mkdir\t%s\n", path);
    return status;
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    if (!inside(to)) return real(from, to);
    if (refused()) return -1;
    unsigned long old = inode(to);
    keep(to);
    int status = real(from, to);
    if (status == 0) note("rename\t%s\t%s\t%lu\n", from, to, old);
    return status;
}

int unlink(const char *path) {
    REAL(int, "unlink", const char *);
    if (!inside(path)) return real(path);
    unsigned long old = inode(path);
    keep(path);
    int status = real(path);
    if (status == 0) note("unlink\t%s\t%lu\n", path, old);
    return status;
}

int rmdir(const char *path) {
    REAL(int, "rmdir", const char *);
    int status = real(path);
    if (status == 0 && inside(path)) note("rmdir\t%s\n", path);
    return status;
}

int unlinkat(int at, const char *name, int flags) {
    REAL(int, "unlinkat", int, const char *, int);
    char link[64], path[2 * PATH_MAX];
    snprintf(link, sizeof link, "/proc/self/fd/%d", at);
    ssize_t n = name[0] == '/' || at < 0 ? 0 : readlink(link, path, PATH_MAX);
    snprintf(path + (n > 0 ? n : 0), PATH_MAX, n > 0 ? "/%s" : "%s", name);
    if (!inside(path)) return real(at, name, flags);
    return flags & AT_REMOVEDIR ? rmdir(path) : unlink(path);
}

ssize_t write(int fd, const void *data, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (!inside_fd(fd)) return real(fd, data, n);
    if (refused()) return -1;
    ssize_t done = real(fd, data, n);
    wrote(fd, lseek(fd, 0, SEEK_CUR) - done, done);
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (!inside_fd(fd)) return real(fd, parts, n);
    if (refused()) return -1;
    ssize_t done = real(fd, parts, n);
    wrote(fd, lseek(fd, 0, SEEK_CUR) - done, done);
    return done;
}

#define PWRITE(name) \
    ssize_t name(int fd, const void *data, size_t n, off_t at) { \
        REAL(ssize_t, #name, int, const void *, size_t, off_t); \
        if (!inside_fd(fd)) return real(fd, data, n, at); \
        if (refused()) return -1; \
        ssize_t done = real(fd, data, n, at); \
        wrote(fd, at, done); \
        return done; \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define TRUNCATE(name) \
    int name(int fd, off_t size) { \
        REAL(int, #name, int, off_t); \
        struct stat known; \
        if (!inside_fd(fd) || fstat(fd, &known) != 0) return real(fd, size); \
        if (size > known.st_size && refused()) return -1; \
        int status = real(fd, size); \
        if (status == 0 && size < known.st_size) note("cut\t%lu\t%ld\n", inode_fd(fd), (long)size); \
        return status; \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define FLUSH(name) \
    int name(int fd) { \
        REAL(int, #name, int); \
        struct stat known; \
        if (!inside_fd(fd)) return real(fd); \
        if (refused()) return -1; \
        int status = real(fd); \
        if (status == 0 && fstat(fd, &known) == 0) \
            note("flush\t%lu\t%ld\n", known.st_ino, (long)known.st_size); \
        return status; \
    }
FLUSH(fsync)
FLUSH(fdatasync)
