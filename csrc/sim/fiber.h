// Stackful coroutines: the least that the simulator needs. x86-64 only.
#pragma once

#include <sys/mman.h>

#include <cstddef>
#include <cstdint>
#include <functional>
#include <new>

#if defined(__SANITIZE_ADDRESS__)
#include <sanitizer/asan_interface.h>
#endif

#if !defined(__x86_64__)
#error "the simulator switches stacks in x86-64 assembly; build it on such a machine"
#endif

// Saves the callee-saved registers and the stack pointer in *save, and continues from `load`.
asm(R"(
.text
.type fxprune_sim_switch, @function
fxprune_sim_switch:
  pushq %rbp
  pushq %rbx
  pushq %r12
  pushq %r13
  pushq %r14
  pushq %r15
  movq %rsp, (%rdi)
  movq %rsi, %rsp
  popq %r15
  popq %r14
  popq %r13
  popq %r12
  popq %rbx
  popq %rbp
  ret
.size fxprune_sim_switch, .-fxprune_sim_switch
)");
extern "C" void fxprune_sim_switch(void** save, void* load);

namespace fxprune::sim {

class Fiber {
 public:
  static constexpr size_t kStack = 256 << 10, kGuard = 4 << 10;  // a page: too deep a stack faults

  Fiber() {
    void* memory =
        mmap(nullptr, kGuard + kStack, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (memory == MAP_FAILED) throw std::bad_alloc();
    stack_ = static_cast<char*>(memory) + kGuard;
    if (mprotect(memory, kGuard, PROT_NONE) != 0) throw std::bad_alloc();
  }
  // Whoever gets these addresses next must not find the frames of a run that was given up poisoned.
  ~Fiber() {
    forget(stack_, kStack);
    munmap(stack_ - kGuard, kGuard + kStack);
  }
  Fiber(const Fiber&) = delete;
  Fiber& operator=(const Fiber&) = delete;

  // Readies the fiber to run `body`, which must not throw. A fiber that ended may start again.
  void start(std::function<void()> body) {
    body_ = std::move(body);
    done_ = false;
    forget(stack_, kStack);  // frames of a run that was given up
    void** top = reinterpret_cast<void**>(stack_ + kStack);
    *--top = nullptr;  // a return address for entry, which never returns
    *--top = reinterpret_cast<void*>(&Fiber::entry);
    for (int i = 0; i < 6; ++i) *--top = nullptr;  // the registers that the switch pops
    own_ = top;
  }

  // Runs the fiber until it yields or ends.
  void resume() {
    running() = this;
    before(&outer_fake_, stack_, kStack);
    fxprune_sim_switch(&outer_, own_);
    after(outer_fake_, nullptr, nullptr);
  }

  // Inside the fiber: back to whoever resumed it.
  void yield() {
    before(done_ ? nullptr : &own_fake_, outer_stack_, outer_size_);
    fxprune_sim_switch(&own_, outer_);
    after(own_fake_, &outer_stack_, &outer_size_);
  }

  bool done() const { return done_; }

 private:
  static Fiber*& running() {
    static thread_local Fiber* fiber = nullptr;
    return fiber;
  }

  static void entry() {
    Fiber* self = running();
    after(nullptr, &self->outer_stack_, &self->outer_size_);
    self->body_();
    self->done_ = true;
    self->yield();
  }

#if defined(__SANITIZE_ADDRESS__)
  static void before(void** fake, const void* stack, size_t size) {
    __sanitizer_start_switch_fiber(fake, stack, size);
  }
  static void after(void* fake, const void** stack, size_t* size) {
    __sanitizer_finish_switch_fiber(fake, stack, size);
  }
  static void forget(void* stack, size_t size) { __asan_unpoison_memory_region(stack, size); }
#else
  static void before(void**, const void*, size_t) {}
  static void after(void*, const void**, size_t*) {}
  static void forget(void*, size_t) {}
#endif

  char* stack_ = nullptr;
  void *own_ = nullptr, *outer_ = nullptr, *own_fake_ = nullptr, *outer_fake_ = nullptr;
  const void* outer_stack_ = nullptr;
  size_t outer_size_ = 0;
  std::function<void()> body_;
  bool done_ = false;
};

}  // namespace fxprune::sim
