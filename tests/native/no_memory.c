/* Preloaded: one allocation of a thread, counted from `fail_at`, finds no memory (glibc). */
#include <errno.h>
#include <stddef.h>

extern void* __libc_malloc(size_t);
extern void* __libc_calloc(size_t, size_t);
extern void* __libc_realloc(void*, size_t);

/* In the thread's own block, as any other place is allocated where it is first used. */
static __thread long at __attribute__((tls_model("initial-exec")));
static __thread long made __attribute__((tls_model("initial-exec")));

/* The n-th allocation from now on fails, none with 0. Returns how many there were since the last call. */
long fail_at(long n) {
  const long before = made;
  made = 0;
  at = n;
  return before;
}

static int fails(void) {
  if (++made != at) return 0;
  errno = ENOMEM;
  return 1;
}

void* malloc(size_t size) { return fails() ? NULL : __libc_malloc(size); }
void* calloc(size_t n, size_t size) { return fails() ? NULL : __libc_calloc(n, size); }
void* realloc(void* old, size_t size) { return fails() ? NULL : __libc_realloc(old, size); }
