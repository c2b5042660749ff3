// A GPU thread block on the host, for testing kernels without a GPU.
//
// Every thread of a block is a fiber that runs until it has to wait: at a barrier, in a warp
// collective, for a copy. The order in which ready threads run follows from a seed. Memory is
// stricter than a GPU's:
//
// - Asynchronous copies land as late as the program allows, at the wait that asks for them. Until
//   then their bytes may be neither read nor written.
// - Shared memory starts poisoned and uninitialised; reading such a byte is a fault.
// - Two threads that touch a byte of shared memory, one of them writing, must be ordered by a
//   barrier, a warp synchronisation or an mbarrier (vector clocks, one entry per thread).
// - What ordinary stores and cp.async wrote may be read by wgmma only after the writer's proxy
//   fence.
// - Global memory is what the test declared: every access is checked for bounds, alignment and
//   permission, and no byte is written twice in one launch.
// - Threads take registers only from those that others of their block gave back (setmaxnreg).
// - Threads that wait for each other forever are a fault that lists what each waits for.
//
// Blocks run one after the other. Out of scope: races between blocks, timing, and lanes of one warp
// that race in lock step.
#pragma once

#include <cstdint>
#include <functional>
#include <stdexcept>
#include <string>

namespace fxprune::sim {

// What a kernel did that it must not.
struct Fault : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Mistakes the machine makes on purpose, as if the kernel had been written so: a test that passes
// with one of them tests nothing.
enum class Plant : int {
  kNone,
  kShortWait,       // cp.async and wgmma waits leave one group more in flight
  kNoBarrier,       // barriers of the whole block do nothing
  kLaneMap,         // ldmatrix takes its row addresses from the lanes in another order
  kSwizzle,         // matrix reads swap neighbouring 16-byte chunks
  kNoProxyFence,    // proxy fences do nothing
  kNoPhaseWait,     // waits on an mbarrier return at once
  kEarlyArrive,     // an mbarrier completes one arrival early
  kNoMatrixFence,   // wgmma.fence does nothing
  kAccumulatorRow,  // the accumulators' row halves are exchanged
  kPlaces,          // mma.sp takes the places of kept elements from the other pair of lanes
};

// Declares `bytes` of global memory at `data` for the launches that follow. Writable memory counts
// as unwritten until a kernel writes it.
void declare(const void* data, int64_t bytes, bool writable);

constexpr int64_t kMostShared = 227 << 10, kLeastShared = 99 << 10;  // sm_90; sm_86, sm_89, sm_120

// Forgets every declaration, and sets the seed of the order of threads, the planted mistake and the
// shared memory that a block may have.
void reset(uint32_t seed, Plant plant, int64_t most_shared = kMostShared);
int64_t most_shared();

// Runs a kernel, block after block. blocks: that are to fit on a processor. Throws Fault.
void launch(const int64_t (&grid)[3], int threads, int blocks, int64_t shared_bytes,
            const std::function<void()>& kernel);

// Lets kernels touch any global memory, unchecked, until the next reset.
void trust_global_memory();

// True when every byte of the declared memory at `data` has been written.
bool all_written(const void* data);

// ---- the running thread, for ptx.h ----

struct Place {
  int thread, threads;
  int64_t block[3], grid[3];
  char* shared;
};

const Place& place();

// Order of access: every function checks and then does.
void read_shared(void* to, const void* from, int bytes);
void write_shared(void* to, const void* from, int bytes);
void read_global(void* to, const void* from, int bytes);
void write_global(void* to, const void* from, int bytes);

void barrier(int id, int threads);
void sync_warp();

// cp.async: `bytes` of which only `valid` are read, the rest are zeros.
void copy_async(void* to, const void* from, int bytes, int valid);
void copy_commit();
void copy_wait(int groups_left);

void mbarrier_init(void* at, int arrivals);
void mbarrier_arrive(void* at, int64_t expect_bytes);
void mbarrier_wait(void* at, int parity);
void copy_bulk(void* to, const void* from, int64_t bytes, void* barrier);
void fence_proxy();

// setmaxnreg: this thread has `count` registers from here on.
void registers_release(int count);
void registers_acquire(int count);

// Meets the other lanes of the warp (32) or of the warpgroup (128); the last one runs `work` with
// what every lane brought, in lane order.
void collective(const char* name, int lanes, void* brought,
                const std::function<void(void* const*)>& work);

// A matrix instruction of a warpgroup: reads its operands and writes its accumulators at the wait.
struct Product {
  // Calls the function with every shared address of 2 bytes that the instruction reads.
  std::function<void(const std::function<void(const char*)>&)> operands;
  std::function<void()> run;
};
void product_fence();
void product_issue(Product product);
void product_commit();
void product_wait(int groups_left);

Plant planted();
[[noreturn]] void fault(const std::string& what);

}  // namespace fxprune::sim
