// A few threads that wait without spinning: the language model has the same cores, and its threads do spin.
#pragma once

#include <cstdint>
#include <type_traits>

namespace agpt {

// Calls `work(context, task, slot)` for every task 0 ≤ task < count, on the calling thread and at most threads - 1
// others; `slot`, 0 ≤ slot < threads, is a different number for each thread at work. Returns when all is done. A
// second caller at the same time does its work alone.
void run_tasks(int32_t count, int32_t threads, void (*work)(void*, int32_t, int32_t), void* context);

template <typename Work>
void parallel(int32_t count, int32_t threads, Work&& work) {
  using Plain = std::remove_reference_t<Work>;
  run_tasks(
      count, threads,
      [](void* context, int32_t task, int32_t slot) { (*static_cast<Plain*>(context))(task, slot); }, &work);
}

}  // namespace agpt
