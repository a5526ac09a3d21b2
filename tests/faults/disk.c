/* Loaded with LD_PRELOAD: counts the calls that change a folder, and lets one of them, or all from it on, fail
   or kill the process. A write that fails or is killed writes half of its bytes first, as a full disk does. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

static char folder[PATH_MAX];
static long calls, at, until;
static int error; /* 0: SIGKILL */

void disk_arm(const char *path, long first, long last, int number) {
    strncpy(folder, path, sizeof folder - 1);
    calls = 0, at = first, until = last, error = number;
}
long disk_calls(void) { return calls; }

static int inside(int dir, const char *path) {
    char link[64], whole[2 * PATH_MAX] = "";
    if (!folder[0] || !path) return 0;
    if (path[0] != '/') {
        if (dir == AT_FDCWD) strcpy(link, "/proc/self/cwd");
        else snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, whole, PATH_MAX);
        if (n < 0) return 0;
        whole[n] = '/', whole[n + 1] = 0;
    }
    strncat(whole, path, PATH_MAX);
    return !strncmp(whole, folder, strlen(folder));
}
static int open_inside(int fd) {
    char link[64], whole[PATH_MAX] = "";
    if (!folder[0]) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    return readlink(link, whole, PATH_MAX - 1) > 0 && !strncmp(whole, folder, strlen(folder));
}
static int due(void) { return ++calls >= at && calls <= until; }
static int fail(void) {
    if (!error) kill(getpid(), SIGKILL), pause();
    errno = error;
    return -1;
}

#define NEXT(name) ((typeof(&name))dlsym(RTLD_NEXT, #name))
#define AROUND(type, name, where, parameters, arguments) \
    type name parameters { return (where) && due() ? fail() : NEXT(name) arguments; }

ssize_t write(int fd, const void *bytes, size_t n) {
    if (!open_inside(fd) || !due()) return NEXT(write)(fd, bytes, n);
    NEXT(write)(fd, bytes, n / 2);
    return fail();
}
AROUND(int, fsync, open_inside(fd), (int fd), (fd))
AROUND(int, ftruncate64, open_inside(fd), (int fd, off64_t n), (fd, n))
AROUND(int, rename, inside(AT_FDCWD, to), (const char *from, const char *to), (from, to))
AROUND(int, mkdir, inside(AT_FDCWD, path), (const char *path, mode_t mode), (path, mode))
AROUND(int, unlink, inside(AT_FDCWD, path), (const char *path), (path))
AROUND(int, unlinkat, inside(dir, path), (int dir, const char *path, int flags), (dir, path, flags))
AROUND(int, rmdir, inside(AT_FDCWD, path), (const char *path), (path))
int open64(const char *path, int flags, ...) {
    va_list rest;
    va_start(rest, flags);
    int mode = flags & O_CREAT ? va_arg(rest, int) : 0;
    va_end(rest);
    return flags & O_CREAT && inside(AT_FDCWD, path) && due() ? fail() : NEXT(open64)(path, flags, mode);
}
