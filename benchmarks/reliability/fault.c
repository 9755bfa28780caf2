/* A disk that is full (or read-only) from the n-th write on, below one directory: preloaded by full.py.
 *
 * Counted are the calls that need space or a writable place: opening to create or write, mkdir, write, pwrite, fsync,
 * ftruncate, rename. Removing never fails, as on a full disk. cc -shared -fPIC -o fault.so fault.c -ldl
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

static char place[PATH_MAX];
static size_t place_length;
static long first, counted;
static int code;

void fault_arm(const char *directory, long from, int number) {
    snprintf(place, sizeof place, "%s", directory);
    place_length = strlen(place);
    first = from;
    counted = 0;
    code = number;
}

long fault_count(void) { return counted; }

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

static int refused(void) {
    long now = __atomic_add_fetch(&counted, 1, __ATOMIC_SEQ_CST);
    if (first && now >= first) {
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
        if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && inside(path) && refused()) return -1; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)

#define OPENAT(name) \
    int name(int at, const char *path, int flags, ...) { \
        va_list rest; va_start(rest, flags); mode_t mode = va_arg(rest, mode_t); va_end(rest); \
        REAL(int, #name, int, const char *, int, ...); \
        if ((flags & (O_CREAT | O_WRONLY | O_RDWR)) && inside(path) && refused()) return -1; \
        return real(at, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

int mkdir(const char *path, mode_t mode) {
    REAL(int, "mkdir", const char *, mode_t);
    struct stat known;
    if (inside(path) && stat(path, &known) != 0 && refused()) return -1;
    return real(path, mode);
}

int rename(const char *from, const char *to) {
    REAL(int, "rename", const char *, const char *);
    if (inside(to) && refused()) return -1;
    return real(from, to);
}

ssize_t write(int fd, const void *data, size_t n) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (inside_fd(fd) && refused()) return -1;
    return real(fd, data, n);
}

ssize_t writev(int fd, const struct iovec *parts, int n) {
    REAL(ssize_t, "writev", int, const struct iovec *, int);
    if (inside_fd(fd) && refused()) return -1;
    return real(fd, parts, n);
}

#define PWRITE(name) \
    ssize_t name(int fd, const void *data, size_t n, off_t at) { \
        REAL(ssize_t, #name, int, const void *, size_t, off_t); \
        if (inside_fd(fd) && refused()) return -1; \
        return real(fd, data, n, at); \
    }
PWRITE(pwrite)
PWRITE(pwrite64)

#define TRUNCATE(name) \
    int name(int fd, off_t size) { \
        REAL(int, #name, int, off_t); \
        struct stat known; \
        if (inside_fd(fd) && fstat(fd, &known) == 0 && size > known.st_size && refused()) return -1; \
        return real(fd, size); \
    }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

int fsync(int fd) {
    REAL(int, "fsync", int);
    if (inside_fd(fd) && refused()) return -1;
    return real(fd);
}
