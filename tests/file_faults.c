// Preloaded into a process: kills it, or fails, at the n-th file system call below a directory. See file_faults.py.

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

static char directory[PATH_MAX];
static long calls, first = -1;
static int error_number, lasting;

// Starts to count calls below `below`. Call number `at`, from 0, fails with `error` (0: SIGKILL); with `last` all later too.
void fault_arm(const char* below, long at, int error, int last) {
  strncpy(directory, below, sizeof directory - 1);
  calls = 0;
  first = at;
  error_number = error;
  lasting = last;
}

// Stops; returns the number of calls.
long fault_disarm(void) {
  directory[0] = 0;
  return calls;
}

static int fails_at(const char* path) {
  if (!directory[0] || strncmp(path, directory, strlen(directory))) return 0;
  const long call = calls++;
  if (first < 0 || call < first || (call > first && !lasting)) return 0;
  if (!error_number) kill(getpid(), SIGKILL);
  errno = error_number;
  return 1;
}

static int fails_on(int descriptor) {
  if (!directory[0]) return 0;
  char link[64], path[PATH_MAX] = {0};
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  return readlink(link, path, sizeof path - 1) > 0 && fails_at(path);
}

static int fails_in(int descriptor, const char* path) {
  return path[0] == '/' || descriptor == AT_FDCWD ? fails_at(path) : fails_on(descriptor);
}

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))
#define MODE_OF(flags) \
  mode_t mode = 0;     \
  if (flags & (O_CREAT | O_TMPFILE)) { \
    va_list rest;      \
    va_start(rest, flags); \
    mode = va_arg(rest, mode_t); \
    va_end(rest);      \
  }

int open(const char* path, int flags, ...) {
  MODE_OF(flags)
  return fails_at(path) ? -1 : REAL(open)(path, flags, mode);
}
int open64(const char* path, int flags, ...) {
  MODE_OF(flags)
  return fails_at(path) ? -1 : REAL(open64)(path, flags, mode);
}
int openat(int at, const char* path, int flags, ...) {
  MODE_OF(flags)
  return fails_in(at, path) ? -1 : REAL(openat)(at, path, flags, mode);
}
int openat64(int at, const char* path, int flags, ...) {
  MODE_OF(flags)
  return fails_in(at, path) ? -1 : REAL(openat64)(at, path, flags, mode);
}
ssize_t read(int file, void* into, size_t n) { return fails_on(file) ? -1 : REAL(read)(file, into, n); }
ssize_t write(int file, const void* from, size_t n) { return fails_on(file) ? -1 : REAL(write)(file, from, n); }
int fsync(int file) { return fails_on(file) ? -1 : REAL(fsync)(file); }
int ftruncate64(int file, off64_t n) { return fails_on(file) ? -1 : REAL(ftruncate64)(file, n); }
int rename(const char* from, const char* to) { return fails_at(from) ? -1 : REAL(rename)(from, to); }
int mkdir(const char* path, mode_t mode) { return fails_at(path) ? -1 : REAL(mkdir)(path, mode); }
int unlink(const char* path) { return fails_at(path) ? -1 : REAL(unlink)(path); }
int unlinkat(int at, const char* path, int flags) { return fails_in(at, path) ? -1 : REAL(unlinkat)(at, path, flags); }
int rmdir(const char* path) { return fails_at(path) ? -1 : REAL(rmdir)(path); }
int close(int file) {
  const int fails = fails_on(file), error = errno;
  const int result = REAL(close)(file);  // a file is closed even if that fails
  if (fails) errno = error;
  return fails ? -1 : result;
}
void* mmap64(void* at, size_t n, int protection, int flags, int file, off64_t offset) {
  return file >= 0 && fails_on(file) ? MAP_FAILED : REAL(mmap64)(at, n, protection, flags, file, offset);
}
