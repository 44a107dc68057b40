// SONew's step on a CPU, gradient to direction in one sweep over memory, for all parameters in one call.
//
// The mathematics is that of lightning_soo/linalg/banded.py and preconditioners/banded.py (Devvrit et al. 2023, arXiv
// 2311.10085), which tests hold this against. Compiled and loaded by banded_host.py; plain C++17 without torch's headers,
// so that it takes seconds to compile and survives any torch version.
//
// Work is cut at the ends of chains, so pieces know nothing of each other and threads need no locks. Only chains longer
// than a piece are treated in three phases (peaks, statistics, directions) when there are several threads.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <thread>
#include <type_traits>
#include <vector>

namespace {

constexpr int64_t kBlock = 256;      // elements whose intermediates stay in the first-level cache (1024: 1.5 times slower)
constexpr int64_t kPiece = 1 << 14;  // elements between two looks at the queue; their diagonal stays in the second level
constexpr int64_t kLargestBand = 4;
constexpr int64_t kHalo = 4 * kLargestBand;

struct bfloat16 {
  uint16_t bits;
};

inline float widen(float value) { return value; }
inline double widen(double value) { return value; }
inline float widen(bfloat16 value) {
  uint32_t bits = uint32_t(value.bits) << 16;
  float result;
  std::memcpy(&result, &bits, 4);
  return result;
}
// By value: a reference to a local would keep a loop from vectorising.
template <typename Outer, typename T>
inline Outer narrow(T value) {
  if constexpr (std::is_same_v<Outer, bfloat16>) {  // to nearest even; values are finite
    uint32_t bits;
    std::memcpy(&bits, &value, 4);
    return bfloat16{uint16_t((bits + 0x7fff + ((bits >> 16) & 1)) >> 16)};
  } else {
    return value;
  }
}

}  // namespace

extern "C" struct Run {  // as _Run of banded_host.py
  void *gradient, *momentum, *bands;
  const void *ridge;    // one for each chain that the run touches, or null: ridge_eps times the chain's largest diagonal
  int64_t n, start, chain_length, stride, bandwidth;
  int64_t own_begin, own_end;  // whose squares are summed
  int64_t kind;                // 0 float, 1 double, 2 bfloat16 with float bands
  double complement, decay, weight, scale, graft_eps, ridge_eps, gamma;
  double direction_square, graft_square;  // results
};

namespace {

template <typename T, typename Outer>
struct View {  // a run, or the part of one between two ends of chains
  Outer *gradient, *momentum;
  T *bands;
  int64_t n, start, chain_length, stride, bandwidth, own_begin, own_end;
  T complement, decay, weight, scale, graft_eps, gamma;
  const T *ridge;  // of the chains from the one that `start` lies in

  View(const Run &run, int64_t first, int64_t last, const T *ridges)
      : gradient(static_cast<Outer *>(run.gradient) + first),
        momentum(static_cast<Outer *>(run.momentum) + first),
        bands(static_cast<T *>(run.bands) + first),
        n(last - first), start(run.start + first), chain_length(run.chain_length), stride(run.stride),
        bandwidth(run.bandwidth),
        own_begin(std::clamp<int64_t>(run.own_begin - first, 0, last - first)),
        own_end(std::clamp<int64_t>(run.own_end - first, 0, last - first)),
        complement(T(run.complement)), decay(T(run.decay)), weight(T(run.weight)), scale(T(run.scale)),
        graft_eps(T(run.graft_eps)), gamma(T(run.gamma)), ridge(ridges) {}

  int64_t chain_of(int64_t j) const { return (start + j) / chain_length - start / chain_length; }
  int64_t end_of_chain(int64_t j) const { return std::min(n, (((start + j) / chain_length) + 1) * chain_length - start); }
};

enum Phase { kSweep, kPeaks, kObserve, kDirect };

struct Task {
  int64_t run, first, last;
  double direction, graft, peak;
};

template <typename T>
double sum_of_squares(const T *values, int64_t n) {
  T sum = 0;
#pragma omp simd reduction(+ : sum)
  for (int64_t j = 0; j < n; ++j) sum += values[j] * values[j];
  if (sum > T(1e-30) && sum < T(1e37)) return double(sum);
  double exact = 0;  // extreme gradients
  for (int64_t j = 0; j < n; ++j) exact += double(values[j]) * double(values[j]);
  return exact;
}

template <typename T>
T largest(const T *values, int64_t n) {
  T found = 0;
#pragma omp simd reduction(max : found)
  for (int64_t j = 0; j < n; ++j) found = values[j] > found ? values[j] : found;
  return found;
}

// Advance momentum and statistics of elements [first, last), at most a block; return the sum of squares of the graft.
template <typename T, typename Outer>
double observe(const View<T, Outer> &run, int64_t first, int64_t last) {
  T ratio[kBlock];
  const T complement = run.complement, decay = run.decay, scale = run.scale, weight = run.weight, eps = run.graft_eps;
  const int64_t size = last - first;
  const Outer *gradient = run.gradient + first;
  Outer *momentum = run.momentum + first;
  T *diagonal = run.bands + first;
  const int64_t coupled = std::min(last, run.n - 1) - first;
  T *coupling = run.bands + run.stride + first;
  const bool together = run.bandwidth >= 1;
  const int64_t paired = together ? std::max<int64_t>(coupled, 0) : 0;
  auto one = [&](int64_t j) {
    const T raw = widen(gradient[j]), value = raw * scale;
    const T old = widen(momentum[j]);
    momentum[j] = narrow<Outer>(old + complement * (raw - old));
    const T second = diagonal[j] * decay + weight * value * value;
    diagonal[j] = second;
    ratio[j] = widen(momentum[j]) / (std::sqrt(second) + eps);
    return value;
  };
#pragma GCC ivdep
  for (int64_t j = 0; j < paired; ++j) {
    const T value = one(j);
    coupling[j] = coupling[j] * decay + weight * value * (widen(gradient[j + 1]) * scale);
  }
#pragma GCC ivdep
  for (int64_t j = paired; j < size; ++j) one(j);
  for (int64_t k = 2; k <= run.bandwidth; ++k) {
    T *band = run.bands + k * run.stride + first;
    const int64_t valid = std::min(last, run.n - k) - first;
#pragma GCC ivdep
    for (int64_t j = 0; j < valid; ++j)
      band[j] = band[j] * decay + weight * (widen(gradient[j]) * scale) * (widen(gradient[j + k]) * scale);
  }
  if (run.bandwidth > 0) {
    const int64_t length = run.chain_length;
    for (int64_t end = run.end_of_chain(first); ; end += length) {  // couplings that leave their chain
      // the last chain may go on behind the run
      if ((run.start + end) % length == 0)
        for (int64_t k = 1; k <= run.bandwidth; ++k)
          for (int64_t j = std::max({first, end - k, end - length}); j < std::min(end, last); ++j)
            run.bands[k * run.stride + j] = 0;
      if (end >= last + run.bandwidth || end >= run.n) break;
    }
  }
  const int64_t begin = std::max(first, run.own_begin), end = std::min(last, run.own_end);
  return begin < end ? sum_of_squares(ratio + (begin - first), end - begin) : 0.0;
}

// The diagonal with its ridge, elements [first, last).
template <typename T, typename Outer>
void regularise(const View<T, Outer> &run, int64_t first, int64_t last, T *to) {
  const T tiny = std::numeric_limits<T>::min();
  for (int64_t j = first; j < last;) {
    const int64_t end = std::min(run.end_of_chain(j), last);
    const T ridge = std::max(run.ridge[run.chain_of(j)], tiny);
#pragma GCC ivdep
    for (int64_t i = j; i < end; ++i) to[i - first] = run.bands[i] + ridge;
    j = end;
  }
}

// Give the direction away: over the gradient; return its sum of squares.
template <typename T, typename Outer>
double give(const View<T, Outer> &run, int64_t first, int64_t last, const T *direction) {
  Outer *out = run.gradient + first;
#pragma GCC ivdep
  for (int64_t j = 0; j < last - first; ++j) out[j] = narrow<Outer>(direction[j]);
  const int64_t begin = std::max(first, run.own_begin), end = std::min(last, run.own_end);
  return begin < end ? sum_of_squares(direction + (begin - first), end - begin) : 0.0;
}

template <typename T, typename Outer>
double direct_diagonal(const View<T, Outer> &run, int64_t first, int64_t last) {
  T diagonal[kBlock], direction[kBlock];
  regularise(run, first, last, diagonal);
  const Outer *momentum = run.momentum + first;
#pragma GCC ivdep
  for (int64_t j = 0; j < last - first; ++j) direction[j] = widen(momentum[j]) / diagonal[j];
  return give(run, first, last, direction);
}

// linalg.banded with one neighbour: psi_j = e_j / d_{j+1}, 1/D_j = d_j - psi_j e_j.
template <typename T, typename Outer>
double direct_tridiagonal(const View<T, Outer> &run, int64_t first, int64_t last) {
  T diagonal[kBlock + 2], psi[kBlock + 1], inner[kBlock + 1], direction[kBlock];
  const int64_t begin = std::max<int64_t>(first - 1, 0), end = std::min(last + 1, run.n), size = last - begin;
  regularise(run, begin, end, diagonal);
  const T *coupling = run.bands + run.stride + begin;
  const Outer *momentum = run.momentum + begin;
  const T gamma = run.gamma;
  const int64_t paired = std::min(size, run.n - 1 - begin);
#pragma GCC ivdep
  for (int64_t j = 0; j < paired; ++j) {
    const T here = diagonal[j], edge = coupling[j];
    T ratio = edge / diagonal[j + 1];
    const T residual = here - ratio * edge;
    const bool keep = residual > gamma * here;
    ratio = keep ? ratio : T(0);
    psi[j] = ratio;
    inner[j] = (widen(momentum[j]) - ratio * widen(momentum[j + 1])) / (keep ? residual : here);
  }
  if (paired < size) {
    psi[paired] = 0;
    inner[paired] = widen(momentum[paired]) / diagonal[paired];
  }
  const int64_t back = first - begin;
  if (back == 0) direction[0] = inner[0];
#pragma GCC ivdep
  for (int64_t j = 1 - back; j < last - first; ++j)
    direction[j] = inner[j + back] - psi[j + back - 1] * inner[j + back - 1];
  return give(run, first, last, direction);
}

// Of one chain without or with one neighbour, elements [first, last) of the run: everything in one loop over memory.
//
// A direction needs its right neighbour's new statistics: they are computed twice rather than waited for. Its left
// neighbour's factor is carried from block to block.
template <typename T, typename Outer, bool kCoupled>
void sweep_chain(const View<T, Outer> &run, int64_t first, int64_t last, T ridge, Task &task) {
  T psi[kBlock + 1], inner[kBlock + 1], ratio[kBlock], direction[kBlock];
  const T complement = run.complement, decay = run.decay, scale = run.scale, weight = run.weight, eps = run.graft_eps;
  const T gamma = run.gamma;
  ridge = std::max(ridge, std::numeric_limits<T>::min());
  psi[0] = inner[0] = 0;
  // the last of a chain has no neighbour; the last of a run may have had one, whose coupling stands still
  const int64_t coupled = kCoupled ? last - 1 : first;
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t size = std::min(kBlock, last - begin);
    const int64_t paired = std::clamp<int64_t>(coupled - begin, 0, size);
    Outer *gradient = run.gradient + begin, *momentum = run.momentum + begin;
    T *diagonal = run.bands + begin, *coupling = run.bands + run.stride + begin;
#pragma GCC ivdep
    for (int64_t j = 0; j < paired; ++j) {
      const T raw = widen(gradient[j]), next = widen(gradient[j + 1]), value = raw * scale, beyond = next * scale;
      const T old = widen(momentum[j]), old_next = widen(momentum[j + 1]);
      const Outer rounded = narrow<Outer>(old + complement * (raw - old));
      const T filtered = widen(rounded), second = diagonal[j] * decay + weight * value * value;
      const T following = widen(narrow<Outer>(old_next + complement * (next - old_next)));
      const T here = second + ridge, there = diagonal[j + 1] * decay + weight * beyond * beyond + ridge;
      const T edge = coupling[j] * decay + weight * value * beyond;
      momentum[j] = rounded;
      diagonal[j] = second;
      coupling[j] = edge;
      ratio[j] = filtered / (std::sqrt(second) + eps);
      // psi_j = e_j / d_{j+1}, 1/D_j = d_j - psi_j e_j; the gate is a number, for a branch would not vectorise
      const T solved = edge / there, kept = solved * T(here - solved * edge > gamma * here);
      psi[j + 1] = kept;
      inner[j + 1] = (filtered - kept * following) / (here - kept * edge);
    }
#pragma GCC ivdep
    for (int64_t j = paired; j < size; ++j) {
      const T raw = widen(gradient[j]), value = raw * scale, old = widen(momentum[j]);
      momentum[j] = narrow<Outer>(old + complement * (raw - old));
      const T filtered = widen(momentum[j]), second = diagonal[j] * decay + weight * value * value;
      diagonal[j] = second;
      ratio[j] = filtered / (std::sqrt(second) + eps);
      psi[j + 1] = 0;
      inner[j + 1] = filtered / (second + ridge);
    }
#pragma GCC ivdep
    for (int64_t j = 0; j < size; ++j) direction[j] = inner[j + 1] - psi[j] * inner[j];
    task.direction += give(run, begin, begin + size, direction);
    const int64_t from = std::max(begin, run.own_begin), to = std::min(begin + size, run.own_end);
    if (from < to) task.graft += sum_of_squares(ratio + (from - begin), to - from);
    psi[0] = psi[size];
    inner[0] = inner[size];
  }
}

template <typename T>
struct Workspace {  // of a block with its halo
  static constexpr int64_t size = kBlock + kHalo;
  T diagonal[size], inverse[size], keep[size], connected[size], inner[size], direction[size];
  T lower[kLargestBand][size], cut[kLargestBand + 1][size];
};

// The windows of elements [0, n): L[j + i, j] into lower[i - 1][j] and 1/D_j. Each window is a matrix of its own in
// registers, S = U P U^T with the far end eliminated first: then the last pivot is 1/D_j, and with u its row of U,
// S[I_j, I_j]^-1 S[I_j, j] follows from u by substitution. Pivots are held above rounding noise: a window with a smaller
// one holds a vertex that edge removal cuts off before it is solved again.
template <int kBand, typename T>
void solve_windows(Workspace<T> &work, const T *const *bands, int64_t n) {
  const T epsilon = std::numeric_limits<T>::epsilon();
  const T *rows[kBand + 1];
  T *lower[kBand];
  for (int k = 0; k <= kBand; ++k) rows[k] = k ? bands[k] : work.diagonal;
  for (int k = 0; k < kBand; ++k) lower[k] = work.lower[k];
  T *inverse = work.inverse;
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) {
    T pivot[kBand + 1], over[kBand + 1], upper[kBand + 1][kBand + 1];
#pragma GCC unroll 16
    for (int p = kBand; p >= 0; --p) {
      T value = rows[0][j + p];
      const T noise = value * epsilon;
#pragma GCC unroll 16
      for (int q = p + 1; q <= kBand; ++q) value -= upper[p][q] * upper[p][q] * pivot[q];
      pivot[p] = value > noise ? value : noise;
      over[p] = p ? T(1) / pivot[p] : T(0);
#pragma GCC unroll 16
      for (int r = 0; r < p; ++r) {
        T covariance = rows[p - r][j + r];
#pragma GCC unroll 16
        for (int q = p + 1; q <= kBand; ++q) covariance -= upper[r][q] * (upper[p][q] * pivot[q]);
        upper[r][p] = covariance * over[p];
      }
    }
    inverse[j] = pivot[0];
    T solution[kBand + 1];
#pragma GCC unroll 16
    for (int p = 1; p <= kBand; ++p) {
      T value = upper[0][p];
#pragma GCC unroll 16
      for (int q = 1; q < p; ++q) value -= upper[q][p] * solution[q];
      solution[p] = value;
      lower[p - 1][j] = -value;
    }
  }
}

// Elements [first, last), at most a block of them.
template <int kBand, typename T, typename Outer>
double direct_band(const View<T, Outer> &run, int64_t first, int64_t last, Workspace<T> &work) {
  const int64_t begin = std::max<int64_t>(first - kBand, 0);
  const int64_t end = std::min<int64_t>(last + 2 * kBand - 1, run.n), n = end - begin;
  // windows reach further, to what must be finite and without coupling where the run or what is needed of it ends
  const T *bands[kBand + 1];
  regularise(run, begin, end, work.diagonal);
  std::fill(work.diagonal + n, work.diagonal + n + kBand, T(1));
  for (int64_t k = 1; k <= kBand; ++k) {
    const T *band = run.bands + k * run.stride + begin;
    const int64_t valid = std::max<int64_t>(n - k, 0);
    std::copy(band, band + valid, work.cut[k]);
    std::fill(work.cut[k] + valid, work.cut[k] + n + kBand, T(0));
    bands[k] = work.cut[k];
  }
  bands[0] = work.diagonal;
  solve_windows<kBand>(work, bands, n);
  int64_t removed = 0;
  for (int64_t j = 0; j < n; ++j) {
    const T keep = T(work.inverse[j] > run.gamma * work.diagonal[j]);
    work.keep[j] = keep;
    removed += keep == T(0);
  }
  if (removed) {  // cut_chains of linalg/banded.py, and the smaller problem
    std::copy(work.keep, work.keep + n, work.connected);
    for (int64_t k = 1; k <= std::min<int64_t>(kBand, n - 1); ++k) {
      if (k > 1)
        for (int64_t j = 0; j < n - k; ++j) work.connected[j] *= work.keep[j + k - 1];
      for (int64_t j = 0; j < n - k; ++j) work.cut[k][j] *= work.connected[j];
    }
    solve_windows<kBand>(work, bands, n);
  }
  T *inner = work.inner, *direction = work.direction;
  const Outer *momentum = run.momentum + begin;
  for (int64_t j = 0; j < n; ++j) inner[j] = widen(momentum[j]);
  for (int64_t k = 1; k <= std::min<int64_t>(kBand, n - 1); ++k) {
    const T *lower = work.lower[k - 1];
#pragma GCC ivdep
    for (int64_t j = 0; j < n - k; ++j) inner[j] += lower[j] * widen(momentum[j + k]);
  }
#pragma GCC ivdep
  for (int64_t j = 0; j < n; ++j) direction[j] = inner[j] = inner[j] / work.inverse[j];
  for (int64_t k = 1; k <= std::min<int64_t>(kBand, n - 1); ++k) {
    const T *lower = work.lower[k - 1];
#pragma GCC ivdep
    for (int64_t j = 0; j < n - k; ++j) direction[j + k] += lower[j] * inner[j];
  }
  return give(run, first, last, direction + (first - begin));
}

template <typename T, typename Outer>
double direct(const View<T, Outer> &run, int64_t first, int64_t last, Workspace<T> &work) {
  double sum = 0;
  for (int64_t begin = first; begin < last; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, last);
    switch (run.bandwidth) {
      case 0: sum += direct_diagonal(run, begin, end); break;
      case 1: sum += direct_tridiagonal(run, begin, end); break;
      case 2: sum += direct_band<2>(run, begin, end, work); break;
      case 3: sum += direct_band<3>(run, begin, end, work); break;
      default: sum += direct_band<4>(run, begin, end, work);
    }
  }
  return sum;
}


template <typename T, typename Outer>
void carry_out(const Run &run, Task &task, Phase phase, const T *ridges) {
  static thread_local Workspace<T> work;
  std::vector<T> found;
  if (phase == kPeaks) {
    task.peak = double(largest(static_cast<const T *>(run.bands) + task.first, task.last - task.first));
    return;
  }
  if (phase == kObserve || phase == kDirect) {
    const View<T, Outer> whole(run, 0, run.n, ridges);
    if (phase == kDirect) {
      task.direction = direct(whole, task.first, task.last, work);
      return;
    }
    task.graft = 0;
    for (int64_t begin = task.first; begin < task.last; begin += kBlock)
      task.graft += observe(whole, begin, std::min(begin + kBlock, task.last));
    return;
  }
  View<T, Outer> part(run, task.first, task.last, ridges);
  const T *known =
      ridges ? ridges + ((run.start + task.first) / run.chain_length - run.start / run.chain_length) : nullptr;
  task.direction = task.graft = 0;
  for (int64_t j = 0, chain = 0; j < part.n; ++chain) {
    const int64_t end = part.end_of_chain(j);
    const T ridge = known ? known[chain] : largest(part.bands + j, end - j) * T(run.ridge_eps);
    if (run.bandwidth == 0) sweep_chain<T, Outer, false>(part, j, end, ridge, task);
    else if (run.bandwidth == 1) sweep_chain<T, Outer, true>(part, j, end, ridge, task);
    else found.push_back(ridge);
    j = end;
  }
  if (run.bandwidth <= 1) return;
  part.ridge = found.data();
  // a direction needs the new statistics of the neighbours to its right, so directions lag behind
  const int64_t lag = 2 * run.bandwidth - 1;
  int64_t done = 0;
  for (int64_t begin = 0; begin < part.n; begin += kBlock) {
    const int64_t end = std::min(begin + kBlock, part.n), ready = end == part.n ? end : std::max<int64_t>(end - lag, 0);
    task.graft += observe(part, begin, end);
    if (ready > done) task.direction += direct(part, done, ready, work);
    done = std::max(done, ready);
  }
}

void dispatch(const Run &run, Task &task, Phase phase, const void *ridges) {
  if (run.kind == 0) carry_out<float, float>(run, task, phase, static_cast<const float *>(ridges));
  else if (run.kind == 1) carry_out<double, double>(run, task, phase, static_cast<const double *>(ridges));
  else carry_out<float, bfloat16>(run, task, phase, static_cast<const float *>(ridges));
}

template <typename Function>
void in_parallel(int64_t count, int64_t threads, const Function &function) {
  std::atomic<int64_t> next{0};
  auto loop = [&] {
    for (int64_t index = next++; index < count; index = next++) function(index);
  };
  std::vector<std::thread> others;
  for (int64_t index = 1; index < std::min(threads, count); ++index) others.emplace_back(loop);
  loop();
  for (auto &other : others) other.join();
}

}  // namespace

extern "C" {

int64_t soo_largest_band() { return kLargestBand; }
int64_t soo_size_of_run() { return sizeof(Run); }

// parameter <- shrink parameter + alpha direction, in one pass where torch needs two.
void soo_move(float *parameter, const float *direction, int64_t n, double shrink, double alpha, int64_t threads) {
  const float keep = float(shrink), factor = float(alpha);
  const int64_t piece = 1 << 16;
  in_parallel((n + piece - 1) / piece, n < 4 * piece ? 1 : threads, [&](int64_t index) {
    const int64_t last = std::min(n, (index + 1) * piece);
#pragma GCC ivdep
    for (int64_t j = index * piece; j < last; ++j) parameter[j] = keep * parameter[j] + factor * direction[j];
  });
}

// One step of `count` runs; writes directions over gradients and both sums of squares into the runs.
void soo_banded_step(Run *runs, int64_t count, int64_t threads) {
  std::vector<Task> sweeps, long_tasks;
  std::vector<char> is_long(count, 0);
  std::vector<std::vector<double>> wide(count);  // ridges of the long runs
  std::vector<std::vector<float>> narrow_ridges(count);
  for (int64_t index = 0; index < count; ++index) {
    Run &run = runs[index];
    run.direction_square = run.graft_square = 0;
    is_long[index] = threads > 1 && run.chain_length > 8 * kPiece && run.n > 8 * kPiece;
    int64_t first = 0;
    while (first < run.n) {
      int64_t last = std::min(first + kPiece, run.n);
      if (!is_long[index]) {
        const int64_t behind = (run.start + last) % run.chain_length;
        if (behind) last = std::min(last + run.chain_length - behind, run.n);
      }
      (is_long[index] ? long_tasks : sweeps).push_back({index, first, last, 0.0, 0.0, 0.0});
      first = last;
    }
  }
  const int64_t total = int64_t(sweeps.size() + long_tasks.size());
  if (total < 3) threads = 1;  // a thread takes as long to start as a small piece to compute
  in_parallel(int64_t(sweeps.size()), threads, [&](int64_t index) {
    const Run &run = runs[sweeps[index].run];
    dispatch(run, sweeps[index], kSweep, run.ridge);
  });
  if (!long_tasks.empty()) {
    // chains may begin and end anywhere in such a run: its ridges are computed chain by chain
    for (int64_t index = 0; index < count; ++index) {
      const Run &run = runs[index];
      if (!is_long[index] || run.ridge != nullptr) continue;
      std::vector<Task> chains;
      for (int64_t first = 0; first < run.n;) {
        const int64_t end = std::min(run.n, ((run.start + first) / run.chain_length + 1) * run.chain_length - run.start);
        for (int64_t begin = first; begin < end; begin += kPiece)
          chains.push_back({int64_t(wide[index].size()), begin, std::min(begin + kPiece, end), 0.0, 0.0, 0.0});
        wide[index].push_back(0.0);
        first = end;
      }
      in_parallel(int64_t(chains.size()), threads, [&](int64_t task) { dispatch(run, chains[task], kPeaks, nullptr); });
      for (const Task &task : chains) wide[index][task.run] = std::max(wide[index][task.run], task.peak * run.ridge_eps);
      narrow_ridges[index].assign(wide[index].begin(), wide[index].end());
    }
    for (Phase phase : {kObserve, kDirect})
      in_parallel(int64_t(long_tasks.size()), threads, [&](int64_t index) {
        const Run &run = runs[long_tasks[index].run];
        const void *own = run.kind == 1 ? static_cast<const void *>(wide[long_tasks[index].run].data())
                                        : static_cast<const void *>(narrow_ridges[long_tasks[index].run].data());
        dispatch(run, long_tasks[index], phase, run.ridge != nullptr ? run.ridge : own);
      });
  }
  for (const auto *tasks : {&sweeps, &long_tasks})
    for (const Task &task : *tasks) {
      runs[task.run].direction_square += task.direction;
      runs[task.run].graft_square += task.graft;
    }
}
}
