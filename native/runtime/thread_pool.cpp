#include "thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "system.h"

namespace isotherm {
namespace {

constexpr int kSpins = 4000;  // 0.1 to 0.2 milliseconds, by what a pause takes

inline void pause() {
#if defined(__x86_64__)
  _mm_pause();
#elif defined(__aarch64__)
  __asm__ volatile("isb");  // `yield` takes no time where a core has one thread; this takes some 10 nanoseconds
#else
  std::this_thread::yield();
#endif
}

void wait_while(std::atomic<uint32_t>& value, uint32_t old) {
  for (int i = 0; i < kSpins; i++) {
    if (value.load(std::memory_order_acquire) != old) return;
    pause();
  }
  while (value.load(std::memory_order_acquire) == old) value.wait(old, std::memory_order_acquire);
}

}  // namespace

Barrier::Barrier(int num_threads) : groups_(static_cast<size_t>((num_threads + kGroupThreads - 1) / kGroupThreads)) {
  for (int thread = 0; thread < num_threads; thread++)
    groups_[static_cast<size_t>(thread / kGroupThreads)].num_threads++;
}

bool Barrier::arrive_and_wait(int thread, const std::atomic<bool>& stop) {
  Group& mine = groups_[static_cast<size_t>(thread / kGroupThreads)];
  const uint32_t generation = mine.generation.load(std::memory_order_relaxed);
  if (mine.arrived.fetch_add(1, std::memory_order_acq_rel) + 1 < mine.num_threads) {
    wait_while(mine.generation, generation);
    return stopped_;
  }
  mine.arrived.store(0, std::memory_order_relaxed);  // before anyone can leave: all groups have to arrive first
  if (arrived_groups_.fetch_add(1, std::memory_order_acq_rel) + 1 < groups_.size()) {
    wait_while(mine.generation, generation);
    return stopped_;
  }
  arrived_groups_.store(0, std::memory_order_relaxed);
  const bool stopped = stopped_ = stop.load(std::memory_order_relaxed);
  for (Group& group : groups_) {
    group.generation.store(generation + 1);  // in one order with notify_all's look at who sleeps: no wake-up is lost
    group.generation.notify_all();
  }
  return stopped;
}

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads), cpus_(allowed_cpus()), barrier_(num_threads) {
  if (num_threads == 1 || std::ssize(cpus_) != num_threads) cpus_.clear();
  start();
}

ThreadPool::~ThreadPool() {
  if (owner_pid_ != process_id()) {  // the threads stayed with the parent: nothing to join
    for (auto& thread : threads_) thread.detach();
    return;
  }
  quit_.store(true);
  epoch_.fetch_add(1);
  epoch_.notify_all();
  for (auto& thread : threads_) thread.join();
}

void ThreadPool::start() {
  for (auto& thread : threads_) thread.detach();
  threads_.clear();
  owner_pid_ = process_id();
  for (int i = 1; i < num_threads_; i++) threads_.emplace_back([this, i] { work(i); });
}

void ThreadPool::work(int thread) {
  const Pinned pinned(cpu_of(thread));
  uint32_t seen = 0;
  for (;;) {
    wait_while(epoch_, seen);
    seen = epoch_.load(std::memory_order_acquire);
    if (quit_.load()) return;
    (*job_)(thread);
    static const std::atomic<bool> kNever{false};
    barrier_.arrive_and_wait(thread, kNever);
  }
}

void ThreadPool::run(const std::function<void(int)>& job) {
  if (owner_pid_ != process_id()) {
    epoch_.store(0);
    start();
  }
  static const std::atomic<bool> kNever{false};
  const Pinned pinned(cpu_of(0));
  job_ = &job;
  epoch_.fetch_add(1);
  epoch_.notify_all();
  job(0);
  barrier_.arrive_and_wait(0, kNever);
}

}  // namespace isotherm
