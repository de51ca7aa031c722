// The machine under host_shim.h: fibres, a scheduler, device memory, and a server that a test talks to over pipes.
//
// Compiled without sanitizers (they watch the kernels, not this file), linked into one program with the kernels.
// Requests on standard input, answers on standard output; a failed launch answers with its reason; a sanitizer's
// report goes to standard error and ends the program.
#include "host_shim.h"

#include <sys/mman.h>
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <map>
#include <random>
#include <string>
#include <vector>
#if defined(__x86_64__) && !defined(SHIM_UCONTEXT)
#define SHIM_SWITCH  // swapcontext asks the kernel for signal masks at every switch
#else
#include <ucontext.h>
#endif

#include "registry.h"

extern "C" {  // present only in a program linked with the sanitizer
__attribute__((weak)) void *__tsan_get_current_fiber();
__attribute__((weak)) void *__tsan_create_fiber(unsigned);
__attribute__((weak)) void __tsan_switch_to_fiber(void *, unsigned);
__attribute__((weak)) void __tsan_acquire(void *);
__attribute__((weak)) void __tsan_release(void *);
__attribute__((weak)) void __sanitizer_start_switch_fiber(void **, const void *, size_t);
__attribute__((weak)) void __sanitizer_finish_switch_fiber(void *, const void **, size_t *);
extern char __start_shim_shared[] __attribute__((weak)), __stop_shim_shared[] __attribute__((weak));
}

namespace {
constexpr size_t STACK_BYTES = 256 << 10;
constexpr size_t MAX_COPIES = 1024;  // under way in a thread
constexpr unsigned NO_SYNC = 1;  // __tsan_switch_to_fiber_no_sync

enum class State { Ready, AtBarrier, AtWarp, Done };

struct Fiber {
    const void *stack = nullptr;  // its lowest byte
    size_t stack_bytes = 0;
    void *stack_pointer = nullptr;
    void *tsan = nullptr, *asan = nullptr;
    State state = State::Done;
    dim3 thread;
    unsigned index = 0;  // in the block
    unsigned barriers = 0, warp_barriers = 0;
    void *operands = nullptr;
    uint32_t mask = 0;
    struct Copy {
        void *to;
        const void *from;
        int bytes;
    };
    std::vector<Copy> copies;   // asked for and not done, oldest first
    std::vector<int> commits;   // how many of them each commit closed
    int open = 0;               // how many no commit has closed
#if !defined(SHIM_SWITCH)
    ucontext_t context;
#endif
};

std::vector<Fiber *> fibers;
Fiber scheduler;
Fiber *current = nullptr;
dim3 block, grid_size, block_size;
unsigned num_threads;
void (*body)();
std::string failure;
// Where ThreadSanitizer sees threads meet. Barriers take turns between two points: a thread that still leaves one
// must not learn what others did on their way to the next.
char start_point, end_point, barrier_points[2], warp_points[64][2];

void acquire(void *point) {
    if (__tsan_acquire) __tsan_acquire(point);
}
void release(void *point) {
    if (__tsan_release) __tsan_release(point);
}

#if defined(SHIM_SWITCH)
extern "C" void shim_switch(void **save, void *load);
asm(R"(
.text
.globl shim_switch
shim_switch:
    pushq %rbp; pushq %rbx; pushq %r12; pushq %r13; pushq %r14; pushq %r15
    movq %rsp, (%rdi)
    movq %rsi, %rsp
    popq %r15; popq %r14; popq %r13; popq %r12; popq %rbx; popq %rbp
    ret
)");
#endif

void switch_to(Fiber &from, Fiber &to) {
    if (__sanitizer_start_switch_fiber)
        __sanitizer_start_switch_fiber(&from.asan, to.stack, to.stack_bytes);
    if (__tsan_switch_to_fiber) __tsan_switch_to_fiber(to.tsan, NO_SYNC);
    current = &to;
#if defined(SHIM_SWITCH)
    shim_switch(&from.stack_pointer, to.stack_pointer);
#else
    swapcontext(&from.context, &to.context);
#endif
    if (__sanitizer_finish_switch_fiber) {
        const void *bottom;
        size_t size;
        __sanitizer_finish_switch_fiber(from.asan, &bottom, &size);
    }
}

void pause(State state) {
    current->state = state;
    switch_to(*current, scheduler);
}

void fiber_main() {
    if (__sanitizer_finish_switch_fiber) {
        __sanitizer_finish_switch_fiber(nullptr, &scheduler.stack, &scheduler.stack_bytes);
    }
    for (;;) {
        acquire(&start_point);
        body();
        release(&end_point);
        pause(State::Done);
    }
}

Fiber *make_fiber(unsigned index) {
    auto *fiber = new Fiber;
    fiber->index = index;
    fiber->copies.reserve(MAX_COPIES);  // a fibre itself allocates nothing: ThreadSanitizer would see it
    fiber->commits.reserve(MAX_COPIES);
    void *stack = mmap(nullptr, STACK_BYTES, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_STACK, -1, 0);
    fiber->stack = stack;
    fiber->stack_bytes = STACK_BYTES;
    if (__tsan_create_fiber) fiber->tsan = __tsan_create_fiber(0);
#if defined(SHIM_SWITCH)
    auto *top = reinterpret_cast<void **>(static_cast<char *>(stack) + STACK_BYTES);
    *--top = nullptr;  // as a call leaves the stack: 8 bytes off a multiple of 16
    *--top = reinterpret_cast<void *>(fiber_main);
    for (int i = 0; i < 6; i++) *--top = nullptr;
    fiber->stack_pointer = top;
#else
    getcontext(&fiber->context);
    fiber->context.uc_stack.ss_sp = stack;
    fiber->context.uc_stack.ss_size = STACK_BYTES;
    makecontext(&fiber->context, fiber_main, 0);
#endif
    return fiber;
}

__attribute__((optimize("no-tree-loop-distribute-patterns"))) void poison_shared() {
    for (char *byte = __start_shim_shared; byte < __stop_shim_shared; byte++) *byte = char(0xff);  // NaN, -1
}

unsigned count(State state) {
    unsigned n = 0;
    for (unsigned i = 0; i < num_threads; i++) n += fibers[i]->state == state;
    return n;
}

std::string stuck() {
    char text[200];
    std::snprintf(text, sizeof text,
                  "block (%u, %u, %u): %u threads wait at a barrier, %u for other lanes of their warp, %u have returned",
                  block.x, block.y, block.z, count(State::AtBarrier), count(State::AtWarp), count(State::Done));
    return text;
}

/// Fibres of one block, each until it waits or returns, in an order that `seed` chooses: 0 ascending,
/// 1 descending, else a new permutation every round.
void run_block(unsigned seed, std::mt19937 &random) {
    poison_shared();
    std::vector<unsigned> order(num_threads);
    for (unsigned i = 0; i < num_threads; i++) {
        Fiber &fiber = *fibers[i];
        order[i] = seed == 1 ? num_threads - 1 - i : i;
        fiber.state = State::Ready;
        fiber.thread = {i % block_size.x, i / block_size.x % block_size.y, i / block_size.x / block_size.y};
        fiber.copies.clear();
        fiber.commits.clear();
        fiber.open = 0;
        fiber.barriers = fiber.warp_barriers = 0;
    }
    for (;;) {
        if (seed > 1)
            for (unsigned i = num_threads - 1; i > 0; i--) std::swap(order[i], order[random() % (i + 1)]);
        bool ran = false;
        for (unsigned i : order)
            if (fibers[i]->state == State::Ready) {
                switch_to(scheduler, *fibers[i]);
                ran = true;
            }
        if (count(State::Done) == num_threads) return;
        if (count(State::AtBarrier) == num_threads) {
            for (unsigned i = 0; i < num_threads; i++) fibers[i]->state = State::Ready;
        } else if (!ran) {
            failure = stuck();
            for (unsigned i = 0; i < num_threads; i++)  // their stacks are lost where they stand
                if (fibers[i]->state != State::Done) fibers[i] = make_fiber(i);
            return;
        }
    }
}

void launch(void (*kernel)(), unsigned seed) {
    body = kernel;
    while (fibers.size() < num_threads) fibers.push_back(make_fiber(fibers.size()));
    std::mt19937 random(seed);
    unsigned blocks = grid_size.x * grid_size.y * grid_size.z;
    for (unsigned i = 0; i < blocks && failure.empty(); i++) {
        unsigned at = seed == 1 ? blocks - 1 - i : i;
        block = {at % grid_size.x, at / grid_size.x % grid_size.y, at / grid_size.x / grid_size.y};
        release(&start_point);
        run_block(seed, random);
        acquire(&end_point);  // the next block has the same shared memory
    }
}
}  // namespace

namespace shim {
void **kernel_arguments;
std::vector<Kernel> &kernels() {
    static std::vector<Kernel> all;
    return all;
}

const dim3 &thread_idx() { return current->thread; }
const dim3 &block_idx() { return block; }
const dim3 &block_dim() { return block_size; }
const dim3 &grid_dim() { return grid_size; }

void barrier() {
    char *point = &barrier_points[current->barriers++ % 2];
    release(point);
    pause(State::AtBarrier);
    acquire(point);
}

int barrier_or(int value) {
    static int any;
    any |= value != 0;
    barrier();
    int result = any;
    barrier();
    any = 0;
    return result;
}

void warp_meet(uint32_t mask, void *operands, void (*combine)(void **)) {
    unsigned first = current->index / WARP * WARP;
    current->operands = operands;
    current->mask = mask;
    current->state = State::AtWarp;
    void *lanes[WARP] = {};
    for (unsigned lane = 0; lane < WARP; lane++) {
        if (!(mask >> lane & 1)) continue;
        Fiber *other = first + lane < num_threads ? fibers[first + lane] : nullptr;
        if (!other || other->state != State::AtWarp || other->mask != mask) {
            pause(State::AtWarp);  // not the last to come
            return;
        }
        lanes[lane] = other->operands;
    }
    if (combine) combine(lanes);
    for (unsigned lane = 0; lane < WARP; lane++)
        if (mask >> lane & 1) fibers[first + lane]->state = State::Ready;
}

void warp_barrier(uint32_t mask) {
    char *point = &warp_points[current->index / WARP][current->warp_barriers++ % 2];
    release(point);
    warp_meet(mask, nullptr, nullptr);
    acquire(point);
}

void check_aligned(const void *address, unsigned bytes) {
    if (reinterpret_cast<uintptr_t>(address) % bytes == 0) return;
    std::fprintf(stderr, "thread (%u, %u, %u): %p is not aligned to %u bytes\n", current->thread.x, current->thread.y,
                 current->thread.z, address, bytes);
    std::abort();
}

void async_copy(void *to, const void *from, int bytes) {
    if (current->copies.size() == MAX_COPIES) std::abort();
    current->copies.push_back({to, from, bytes});
    current->open++;
}
void async_commit() {
    current->commits.push_back(current->open);
    current->open = 0;
}
int async_ready(int newest_left) {
    int ready = 0, commits = int(current->commits.size()) - newest_left;
    for (int i = 0; i < commits; i++) ready += current->commits[i];
    if (commits > 0) current->commits.erase(current->commits.begin(), current->commits.begin() + commits);
    return ready;
}
void async_take(void **to, const void **from, int *bytes) {
    auto copy = current->copies.front();
    current->copies.erase(current->copies.begin());
    *to = copy.to, *from = copy.from, *bytes = copy.bytes;
}
}  // namespace shim

namespace {
void receive(void *to, size_t bytes) {
    for (auto *at = static_cast<char *>(to); bytes > 0;) {
        ssize_t got = read(0, at, bytes);
        if (got <= 0) std::exit(0);  // the test has ended
        at += got, bytes -= got;
    }
}
void send(const void *from, size_t bytes) {
    for (auto *at = static_cast<const char *>(from); bytes > 0;) {
        ssize_t put = write(1, at, bytes);
        if (put <= 0) std::exit(1);
        at += put, bytes -= put;
    }
}
template <class T> T receive() {
    T value;
    receive(&value, sizeof value);
    return value;
}
std::string receive_text() {
    std::string text(receive<uint32_t>(), 0);
    receive(&text[0], text.size());
    return text;
}
void answer(const std::string &text) {
    uint32_t length = text.size();
    send(&length, 4);
    send(text.data(), length);
}

void serve_launch() {
    std::string name = receive_text();
    grid_size = receive<dim3>(), block_size = receive<dim3>();
    auto seed = receive<uint32_t>();
    std::vector<std::string> arguments(receive<uint32_t>());
    std::vector<void *> pointers;
    for (auto &argument : arguments) {
        argument = receive_text();
        pointers.push_back(&argument[0]);
    }
    num_threads = block_size.x * block_size.y * block_size.z;
    shim::kernel_arguments = pointers.data();
    failure.clear();
    for (const auto &kernel : shim::kernels()) {
        if (name != kernel.name) continue;
        if (arguments.size() != kernel.sizes.size())
            return answer(name + " takes " + std::to_string(kernel.sizes.size()) + " arguments");
        for (size_t i = 0; i < arguments.size(); i++)
            if (arguments[i].size() != kernel.sizes[i])
                return answer(name + ": argument " + std::to_string(i) + " has another size");
        launch(kernel.call, seed);
        return answer(failure);
    }
    answer("no kernel " + name);
}
}  // namespace

int main() {
    if (__tsan_get_current_fiber) scheduler.tsan = __tsan_get_current_fiber();
    for (;;) switch (receive<char>()) {
            case 'a': {  // allocate: malloc, of the exact size
                void *address = std::malloc(receive<uint64_t>());
                send(&address, 8);
                break;
            }
            case 'f':
                std::free(receive<void *>());
                break;
            case 'w': {  // write to the device
                void *to = receive<void *>();
                receive(to, receive<uint64_t>());
                break;
            }
            case 'r': {  // read from it
                void *from = receive<void *>();
                send(from, receive<uint64_t>());
                break;
            }
            case 'l':
                serve_launch();
                break;
        }
}
