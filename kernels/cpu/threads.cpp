#include "threads.h"

#include <pthread.h>

#include <atomic>
#include <condition_variable>
#include <mutex>
#include <system_error>
#include <thread>

namespace agpt {
namespace {

class Pool {
 public:
  void run(int32_t count, int32_t threads, void (*work)(void*, int32_t, int32_t), void* context) {
    const int32_t helpers = (threads < count ? threads : count) - 1;
    std::unique_lock<std::mutex> busy(entry_, std::defer_lock);
    if (helpers < 1 || !busy.try_lock()) {
      for (int32_t task = 0; task < count; ++task) work(context, task, 0);
      return;
    }
    grow(helpers);
    {
      std::lock_guard<std::mutex> lock(mutex_);
      work_ = work, context_ = context, count_ = count;
      next_.store(0, std::memory_order_relaxed);
      wanted_ = helpers < size_ ? helpers : size_;
      slot_ = 1;
    }
    wake_.notify_all();
    take(0);
    std::unique_lock<std::mutex> lock(mutex_);
    wanted_ = 0;  // who has not woken by now is not needed
    done_.wait(lock, [this] { return working_ == 0; });
  }

 private:
  void grow(int32_t helpers) {
    while (size_ < helpers) try {
        std::thread([this] { serve(); }).detach();  // lives as long as the process
        ++size_;
      } catch (const std::system_error&) {
        return;  // no more threads to be had: fewer do the work
      }
  }

  void serve() {
    std::unique_lock<std::mutex> lock(mutex_);
    for (;;) {
      wake_.wait(lock, [this] { return wanted_ > 0; });
      --wanted_;
      ++working_;
      const int32_t slot = slot_++;
      lock.unlock();
      take(slot);
      lock.lock();
      if (--working_ == 0) done_.notify_one();
    }
  }

  void take(int32_t slot) {
    for (int32_t task; (task = next_.fetch_add(1, std::memory_order_relaxed)) < count_;) work_(context_, task, slot);
  }

  std::mutex entry_;  // one caller at a time
  std::mutex mutex_;
  std::condition_variable wake_, done_;
  std::atomic<int32_t> next_{0};
  void (*work_)(void*, int32_t, int32_t) = nullptr;
  void* context_ = nullptr;
  int32_t count_ = 0, wanted_ = 0, working_ = 0, slot_ = 1, size_ = 0;
};

std::atomic<Pool*> the_pool{nullptr};

void forget_pool() { the_pool.store(new Pool, std::memory_order_release); }  // a fork's child has no threads

Pool& pool() {
  static const bool made = [] {
    forget_pool();
    pthread_atfork(nullptr, nullptr, forget_pool);
    return true;
  }();
  (void)made;
  return *the_pool.load(std::memory_order_acquire);
}

}  // namespace

void run_tasks(int32_t count, int32_t threads, void (*work)(void*, int32_t, int32_t), void* context) {
  pool().run(count, threads, work, context);
}

}  // namespace agpt
