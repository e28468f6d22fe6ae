// The only file that knows threads.
#include "parallel.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <condition_variable>
#include <cstdio>
#include <cstdlib>
#include <mutex>
#include <new>
#include <stdexcept>
#include <system_error>
#include <thread>

#include "process.h"

namespace fusedstep {
namespace {

std::atomic<int> most_used{0};

// One loop: pieces are handed out by a counter, so a slow core takes fewer of them.
struct Job {
  const std::function<void(int64_t, int64_t)>& body;
  int64_t n, grain;
  std::atomic<int64_t> next{0};
  std::atomic<int> used{0};  // threads that got a piece

  void work() noexcept {
    for (bool first = true;; first = false) {
      const int64_t begin = next.fetch_add(grain, std::memory_order_relaxed);
      if (begin >= n) return;
      if (first) used.fetch_add(1, std::memory_order_relaxed);
      body(begin, std::min(n, begin + grain));
    }
  }
};

class Pool {
 public:
  // Runs the job with up to `threads` threads, or returns false if another thread's job is running.
  // A worker that wakes after the work is done finds no job and sleeps on: nobody waits for it.
  bool run(Job& job, int threads) {
    std::unique_lock<std::mutex> turn(turn_, std::try_to_lock);
    if (!turn.owns_lock()) return false;
    {
      const std::lock_guard<std::mutex> lock(mutex_);
      while (workers_ < threads - 1 && hire()) ++workers_;
      job_ = &job;
      open_ = threads - 1;
      ++round_;
    }
    wake_.notify_all();
    job.work();
    std::unique_lock<std::mutex> lock(mutex_);
    job_ = nullptr;
    idle_.wait(lock, [this] { return active_ == 0; });
    return true;
  }

 private:
  // False where the system grants no more threads: the work is done by those there are.
  bool hire() {
    try {
      std::thread([this] { serve(); }).detach();
      return true;
    } catch (const std::system_error&) {
      return false;
    } catch (const std::bad_alloc&) {
      return false;
    }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (int64_t seen = 0;;) {
      wake_.wait(lock, [&] { return job_ && round_ != seen && open_ > 0; });
      seen = round_;
      --open_;
      ++active_;
      Job* job = job_;
      lock.unlock();
      job->work();
      lock.lock();
      if (--active_ == 0) idle_.notify_one();
    }
  }

  std::mutex turn_;  // held by the thread whose job is running
  std::mutex mutex_;
  std::condition_variable wake_, idle_;
  int workers_ = 0;
  Job* job_ = nullptr;
  int64_t round_ = 0;
  int open_ = 0, active_ = 0;  // places left in this job; workers inside it
};

// Never destroyed: its workers sleep until the process ends. A forked child has none of them, so it
// gets a new pool and leaves the old one's locks alone.
Pool* pool = nullptr;
int forks = 0;

// A small file's text, empty where there is none. C's functions: the module uses no C++ streams, which
// have a state of the whole process and crashed where another library had brought its own.
std::string read(const std::string& path) {
  std::string text;
  if (std::FILE* file = open_file(path.c_str())) {
    char piece[512];
    while (const size_t n = std::fread(piece, 1, sizeof(piece), file)) text.append(piece, n);
    std::fclose(file);
  }
  return text;
}

// The number a text begins with, 0 where there is none.
double number(const std::string& text) { return std::strtod(text.c_str(), nullptr); }

int environment_threads() {
  const char* text = std::getenv("FUSEDSTEP_NUM_THREADS");
  if (!text || !*text) return default_threads();
  char* end;
  const long n = std::strtol(text, &end, 10);
  if (*end || n < 1 || n > kMaxThreads) {
    throw std::invalid_argument("FUSEDSTEP_NUM_THREADS must be an integer from 1 to " +
                                std::to_string(kMaxThreads) + ", got '" + text + "'");
  }
  return static_cast<int>(n);
}

std::atomic<int> threads{0};

}  // namespace

void start_pool() {
  pool = new Pool;
  after_fork([] {
    pool = new Pool;
    ++forks;
  });
}

int generation() { return forks; }

double cpu_quota(const std::string& membership, const std::string& root) {
  double quota = 0;
  const auto tighten = [&](double used, double period) {
    if (used > 0 && period > 0) quota = quota > 0 ? std::min(quota, used / period) : used / period;
  };
  for (size_t begin = 0, end; begin < membership.size(); begin = end + 1) {
    end = std::min(membership.find('\n', begin), membership.size());
    const std::string line = membership.substr(begin, end - begin);  // hierarchy:controllers:path
    const size_t first = line.find(':'), second = line.find(':', first + 1);
    if (second == std::string::npos) continue;
    const std::string controllers = "," + line.substr(first + 1, second - first - 1) + ",";
    const bool v2 = controllers == ",,", v1 = controllers.find(",cpu,") != std::string::npos;
    if (!v1 && !v2) continue;
    std::string path = line.substr(second + 1);
    for (;;) {  // a group is also bound by the quotas above it
      const std::string directory = root + (v1 ? "/cpu" : "") + path;
      if (v2) {
        const std::string text = read(directory + "/cpu.max");  // "max 100000" has no quota
        tighten(number(text), number(text.substr(std::min(text.find(' '), text.size()))));
      } else {
        tighten(number(read(directory + "/cpu.cfs_quota_us")),
                number(read(directory + "/cpu.cfs_period_us")));
      }
      if (path.empty() || path == "/") break;
      const size_t slash = path.rfind('/');
      path.resize(slash == std::string::npos ? 0 : slash);
    }
  }
  return quota;
}

int default_threads() {
  int cores = usable_cores();
  const double quota = cpu_quota(read("/proc/self/cgroup"), "/sys/fs/cgroup");
  if (quota > 0) cores = std::min(cores, static_cast<int>(std::ceil(quota)));
  const char* processes = std::getenv("LOCAL_WORLD_SIZE");
  return std::max(1, static_cast<int>(cores / std::max(1.0, processes ? number(processes) : 1.0)));
}

int num_threads() {
  int n = threads.load();
  if (n == 0) threads.store(n = environment_threads());
  return n;
}

void set_num_threads(int n) { threads.store(std::min(kMaxThreads, std::max(1, n))); }

void parallel_for(int64_t n, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  if (n <= 0) return;
  Job job{body, n, grain};
  const int useful = static_cast<int>(std::min<int64_t>(num_threads(), (n + grain - 1) / grain));
  if (useful <= 1 || !pool->run(job, useful)) job.work();
  if (job.used > most_used) most_used = job.used.load();  // of two at once either may be told
}

int take_threads_used() { return most_used.exchange(0); }

std::future<uint64_t> elsewhere(const std::function<uint64_t()>& work) {
  // Copied: what is moved is gone with the thread that libstdc++ could not make (GCC 12).
  return std::async(std::launch::async | std::launch::deferred, work);
}

}  // namespace fusedstep
