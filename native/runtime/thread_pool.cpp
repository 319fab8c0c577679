#include "thread_pool.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#include "system.h"

namespace isotherm {
namespace {

constexpr int kSpins = 1000;  // 25 to 50 microseconds, by what a pause takes

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

bool Barrier::arrive_and_wait(const std::atomic<bool>& stop) {
  const uint32_t generation = generation_.load(std::memory_order_relaxed);
  if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == num_threads_) {
    stopped_ = stop.load(std::memory_order_relaxed);
    arrived_.store(0, std::memory_order_relaxed);
    generation_.store(generation + 1, std::memory_order_release);
    generation_.notify_all();
  } else {
    wait_while(generation_, generation);
  }
  return stopped_;
}

ThreadPool::ThreadPool(int num_threads) : num_threads_(num_threads), barrier_(num_threads) { start(); }

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
  uint32_t seen = 0;
  for (;;) {
    wait_while(epoch_, seen);
    seen = epoch_.load(std::memory_order_acquire);
    if (quit_.load()) return;
    (*job_)(thread);
    static const std::atomic<bool> kNever{false};
    barrier_.arrive_and_wait(kNever);
  }
}

void ThreadPool::run(const std::function<void(int)>& job) {
  if (owner_pid_ != process_id()) {
    epoch_.store(0);
    start();
  }
  static const std::atomic<bool> kNever{false};
  job_ = &job;
  epoch_.fetch_add(1, std::memory_order_release);
  epoch_.notify_all();
  job(0);
  barrier_.arrive_and_wait(kNever);
}

}  // namespace isotherm
