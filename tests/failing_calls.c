// Preloaded into a process: counts its system calls on files below a directory, and at one of them kills the process or
// lets the call fail.
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/types.h>
#include <unistd.h>

static char directory[4096];
static long counted, failing = -1;
static int failure;

// From now on; an `error` of 0 kills the process.
void arm(const char* below, long number, int error) {
  snprintf(directory, sizeof directory, "%s", below);
  counted = 0;
  failing = number;
  failure = error;
}

long calls(void) { return counted; }

static int fails(const char* path) {
  if (!directory[0] || strncmp(path, directory, strlen(directory)) || counted++ != failing) return 0;
  if (!failure) kill(getpid(), SIGKILL);
  errno = failure;
  return 1;
}

static int fails_on(int descriptor) {
  if (!directory[0]) return 0;
  char link[64], path[4096];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, path, sizeof path - 1);
  if (length < 0) return 0;
  path[length] = 0;
  return fails(path);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

#define OPEN(name)                                    \
  int name(const char* path, int flags, ...) {        \
    va_list rest;                                     \
    va_start(rest, flags);                            \
    int mode = va_arg(rest, int);                     \
    va_end(rest);                                     \
    return fails(path) ? -1 : REAL(name)(path, flags, mode); \
  }
OPEN(open)
OPEN(open64)

ssize_t read(int file, void* into, size_t n) { return fails_on(file) ? -1 : REAL(read)(file, into, n); }
ssize_t write(int file, const void* from, size_t n) { return fails_on(file) ? -1 : REAL(write)(file, from, n); }
int fsync(int file) { return fails_on(file) ? -1 : REAL(fsync)(file); }
int rename(const char* from, const char* to) { return fails(from) ? -1 : REAL(rename)(from, to); }
int unlink(const char* path) { return fails(path) ? -1 : REAL(unlink)(path); }
int mkdir(const char* path, mode_t mode) { return fails(path) ? -1 : REAL(mkdir)(path, mode); }

int close(int file) {
  int failed = fails_on(file), reported = errno, result = REAL(close)(file);  // the descriptor is gone either way
  if (failed) errno = reported;
  return failed ? -1 : result;
}
