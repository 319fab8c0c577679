// A persistent pool: every job runs on all threads, which meet at barriers. The caller is thread 0.
#pragma once
#include <atomic>
#include <functional>
#include <memory>
#include <thread>
#include <vector>

namespace isotherm {

// Waiting is a short spin, then a sleep in the kernel: a busy neighbour on our core gets its turn.
//
// Two levels: threads meet in groups, and the last of each group for all of it, so that no cache line is written or
// watched by more than kGroupThreads cores.
class Barrier {
 public:
  static constexpr int kGroupThreads = 8;  // cores that share a last-level cache on many machines

  explicit Barrier(int num_threads);

  // True on every thread once `stop` was set before the last one arrived, so that all leave together.
  bool arrive_and_wait(int thread, const std::atomic<bool>& stop);

 private:
  struct Group {
    alignas(64) std::atomic<int> arrived{0};
    int num_threads = 0;
    alignas(64) std::atomic<uint32_t> generation{0};
  };

  std::vector<Group> groups_;
  alignas(64) std::atomic<size_t> arrived_groups_{0};
  bool stopped_ = false;  // written by the last to arrive, read after the generation changed
};

class ThreadPool {
 public:
  explicit ThreadPool(int num_threads);
  ~ThreadPool();
  ThreadPool(const ThreadPool&) = delete;
  ThreadPool& operator=(const ThreadPool&) = delete;

  int num_threads() const { return num_threads_; }
  Barrier& barrier() { return barrier_; }

  // Runs job(thread) on every thread and returns when all have returned.
  void run(const std::function<void(int)>& job);

 private:
  void start();
  void work(int thread);

  // Where there is a thread for each CPU they stay apart: beside other people's work the scheduler puts two of ours on
  // one CPU, where the one that waits holds up the other. Negative: the scheduler decides.
  int cpu_of(int thread) const { return cpus_.empty() ? -1 : cpus_[static_cast<size_t>(thread)]; }

  const int num_threads_;
  std::vector<int> cpus_;
  Barrier barrier_;
  alignas(64) std::atomic<uint32_t> epoch_{0};
  std::atomic<bool> quit_{false};
  const std::function<void(int)>* job_ = nullptr;
  std::vector<std::thread> threads_;
  int owner_pid_ = 0;  // a forked child has none of the threads
};

}  // namespace isotherm
