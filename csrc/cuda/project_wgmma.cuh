// project_kv on sm_90a: the tiles and results of project.cuh, products of two warp groups, 64 tokens each.
//
// Tokens are gathered and columns of weights paired for the rotation, which boxes of a tensor map cannot be: copies
// stay cp.async, of rows of 128 bytes, swizzled as the products want them; a fence makes them seen.
#pragma once

#include "project.cuh"
#include "wgmma.cuh"

namespace c2c {

struct ProjectWgmmaTile : ProjectTile {
  static constexpr int STAGES = 4;
  static constexpr int ROW = K * 2;            // bytes
  static constexpr int STAGE = (M + N) * ROW;  // tokens, then weights
  static constexpr int SHARED = STAGES * STAGE;
  static_assert(ROW == 128 && PASS_ROWS % 8 == 0, "a row is what is swizzled, and rows of a pass are alike");
  static_assert(M * PRODUCT_ROW * 4 <= SHARED, "products fit");
};

// products = tokens weights^T over the whole width, of 8 N columns: while a step is multiplied the next ones are on
// their way.
template <typename T, bool WHOLE, int N>
__device__ __forceinline__ void multiply_groups(float (&products)[N][4], ProjectCopy<T, ProjectWgmmaTile> &copy,
                                                const ProjectHalf &half, const ProjectPlace &place, int width,
                                                int steps, uint32_t stages) {
  using Tile = ProjectWgmmaTile;
  const int batch = place.batch;
  const int row = threadIdx.x / Tile::CHUNKS;
  const uint32_t mine = row * Tile::ROW + swizzled(row, threadIdx.x % Tile::CHUNKS) * 16;
  int to = 0, from = 0;  // stages
  const auto after = [](int stage) { return stage + 1 == Tile::STAGES ? 0 : stage + 1; };
#pragma unroll 1
  for (int step = 0; step < Tile::STAGES - 1; ++step, to = after(to)) {
    if (step < steps) copy.template next<WHOLE>(half, batch, width, stages + to * Tile::STAGE + mine);
    cp_async_commit();
  }
#pragma unroll 1
  for (int left = steps; left > 0; --left, to = after(to), from = after(from)) {
    cp_async_wait<Tile::STAGES - 2>();
    fence_async();
    wgmma_wait<0>();  // everyone is done with the stage that comes next, once the block has met
    wgmma_hold(products);
    __syncthreads();
    const uint32_t tokens = stages + from * Tile::STAGE;
    const uint64_t a = wgmma_rows(tokens + threadIdx.x / 128 * 64 * Tile::ROW);
    const uint64_t b = wgmma_rows(tokens + Tile::M * Tile::ROW);
    wgmma_hold(products);
    wgmma_fence();
#pragma unroll
    for (int k = 0; k < Tile::K / 16; ++k)
      wgmma_shared<T>(products, wgmma_further(a, k * 32), wgmma_further(b, k * 32), true);
    wgmma_commit();
    if (left >= Tile::STAGES) copy.template next<WHOLE>(half, batch, width, stages + to * Tile::STAGE + mine);
    cp_async_commit();
  }
  wgmma_wait<0>();
  wgmma_hold(products);
}

__device__ __forceinline__ void stage_products(float *shared, const float (&products)[16][4]) {
  const int lane = threadIdx.x % WARP, row = threadIdx.x / WARP * 16 + lane / 4;
#pragma unroll
  for (int n = 0; n < 16; ++n)
#pragma unroll
    for (int j = 0; j < 2; ++j)
      store_shared_pair(shared_address(shared + (row + j * 8) * ProjectTile::PRODUCT_ROW +
                                       product_chunk(2 * n + lane % 4 / 2) * 4 + lane % 2 * 2),
                        products[n][2 * j], products[n][2 * j + 1]);
}

template <typename T>
__device__ __forceinline__ void project_wgmma(const Projection &p) {
  project_tile<T, ProjectWgmmaTile>(
      p, [](char *shared, auto &copy, const ProjectHalf &half, const ProjectPlace &place, const auto &...rest) {
        float products[16][4] = {};
        if (copy.whole)
          multiply_groups<T, true>(products, copy, half, place, rest...);
        else if (place.groups > 8)
          multiply_groups<T, false>(products, copy, half, place, rest...);
        else
          multiply_groups<T, false>(reinterpret_cast<float (&)[8][4]>(products), copy, half, place, rest...);
        cp_async_wait<0>();
        __syncthreads();
        stage_products(reinterpret_cast<float *>(shared), products);
      });
}

}  // namespace c2c
