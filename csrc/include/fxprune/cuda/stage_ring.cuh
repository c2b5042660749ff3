// Stages of K on their way to shared memory while earlier ones are multiplied.
#pragma once

#include "fxprune/cuda/ptx.cuh"

namespace fxprune::gpu {

// Goes through `count` stages in their order, Stages - 1 of them under way in a ring of shared
// memory, StageBytes each. fill(i, to): asks for stage i by asynchronous copies; work(i, stage):
// reads it. Called by all threads of a block; nothing is under way at the end.
template <int Stages, int StageBytes, class Count, class Fill, class Work>
FXPRUNE_GPU void through_ring(char* ring, Count count, const Fill& fill, const Work& work) {
  for (int i = 0; i < Stages - 1; ++i) {
    if (i < count) fill(Count{i}, ring + i * StageBytes);
    copy_commit();
  }
  for (Count i = 0; i < count; ++i) {
    copy_wait<Stages - 2>();
    barrier();  // the stage is there for all, and nobody reads the one before any more
    const Count next = i + Stages - 1;
    if (next < count) fill(next, ring + next % Stages * StageBytes);
    copy_commit();
    work(i, static_cast<const char*>(ring + i % Stages * StageBytes));
  }
  copy_wait<0>();
}

}  // namespace fxprune::gpu
