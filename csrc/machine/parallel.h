// A small thread pool of our own: a second OpenMP runtime beside torch's would clash with it.
#pragma once

#include <cstdint>
#include <functional>
#include <future>
#include <string>

namespace fusedstep {

constexpr int kMaxThreads = 4096;

// Once, when the library is loaded: no thread yet, but what makes the pool survive a fork.
void start_pool();

// How many forks this process is away from the one that loaded the library: a mark for what a
// child must not believe. getpid() would be a system call.
int generation();

int num_threads();
void set_num_threads(int n);  // 1 to kMaxThreads

// The cores this process may use: its affinity mask, capped by its cgroup's quota, shared among
// the LOCAL_WORLD_SIZE processes of a launcher. At least 1.
int default_threads();

// The CPU quota of the cgroup that `membership` (the text of /proc/self/cgroup) puts us in, below
// `root` (/sys/fs/cgroup), in cores; 0 where there is none.
double cpu_quota(const std::string& membership, const std::string& root);

// Calls body(begin, end) until [0, n) is covered, from this thread and from the pool's. The pieces
// are `grain` long and each is run once, in no fixed order, so body must not care,
// nor throw. Work of one
// grain, and work that comes while another thread's is running, stays on the calling thread.
void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body);

// The most threads that took part in one such loop since the last call.
int take_threads_used();

// Runs `work` on a thread of its own, or where the system grants none, in get().
std::future<uint64_t> elsewhere(const std::function<uint64_t()>& work);

}  // namespace fusedstep
