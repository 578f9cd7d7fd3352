// The threads that share the programs of a grid; one pool per process, used by every generated kernel.
//
// Helpers join the calling thread *if they are awake and have a core*: the caller takes chunks from a shared counter like
// everybody else and waits only for chunks that a helper has begun, so a helper without a time slice costs nothing.
#include <algorithm>
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <mutex>
#include <thread>
#include <vector>

namespace {

typedef void (*Call)(const void *context, int64_t first, int64_t last);

inline void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

class Pool {
public:
    static Pool &get() {
        static Pool *pool = new Pool;  // never destroyed: helpers may still sleep in it when the process ends
        return *pool;
    }

    void resize(int threads) {
        std::lock_guard<std::mutex> lock(owner_);
        while (int(helpers_.size()) < threads - 1) helpers_.emplace_back([this, id = int(helpers_.size())] { serve(id); });
        wanted_.store(threads - 1);
    }

    int threads() const { return wanted_.load(std::memory_order_relaxed) + 1; }

    void run(Call call, const void *context, int64_t n) {
        const int threads = this->threads();
        if (threads == 1 || n < 2 || !owner_.try_lock()) {  // taken: another thread's kernel has the helpers
            call(context, 0, n);
            return;
        }
        if (alone_ > 0) {
            alone_--;
            owner_.unlock();
            call(context, 0, n);
            return;
        }
        call_ = call;
        context_ = context;
        size_ = n;
        grain_ = std::max<int64_t>(1, n / (threads * 4));
        next_.store(0);
        open_.store(++job_);
        if (sleeping_.load() > 0) {
            std::lock_guard<std::mutex> lock(mutex_);
            wake_.notify_all();
        }
        const auto begun = clock::now();
        const int64_t mine = take();
        open_.store(0);
        const auto done = clock::now();
        while (inside_.load() != 0) pause();
        judge(done - begun, mine, clock::now() - done);
        owner_.unlock();
    }

private:
    using clock = std::chrono::steady_clock;

    int64_t take() {  // how many chunks it took
        int64_t taken = 0;
        for (int64_t begin; (begin = next_.fetch_add(grain_)) < size_; taken++)
            call_(context_, begin, std::min(size_, begin + grain_));
        return taken;
    }

    // Whether helpers pay. They do not where other processes want their cores: then one loses its core within a chunk
    // (the caller waits much longer than a chunk takes), or comes too late for most chunks and only takes time by spinning.
    // The next grids, more of them each time, run on the caller's thread alone.
    void judge(clock::duration worked, int64_t mine, clock::duration waited) {
        constexpr auto normal = std::chrono::microseconds(30);
        constexpr int least = 32, most = 512, window = 64;
        chunks_ += (size_ + grain_ - 1) / grain_;
        mine_ += mine;
        const bool late = waited > normal + 2 * (worked / std::max<int64_t>(1, mine));
        if (!late && ++seen_ < window) return;
        if (late || 4 * (chunks_ - mine_) < chunks_) {
            alone_ = penalty_;
            penalty_ = std::min(2 * penalty_, most);
        } else {
            penalty_ = std::max(penalty_ / 2, least);
        }
        seen_ = 0, chunks_ = mine_ = 0;
    }

    void serve(int id) {
        constexpr auto patience = std::chrono::microseconds(300);  // longer than the gaps between kernels of one step
        uint64_t done = 0;
        auto idle_since = clock::now();
        for (unsigned spins = 0;; spins++) {
            const uint64_t job = open_.load();
            if (job != 0 && job != done && id < wanted_.load(std::memory_order_relaxed)) {
                inside_.fetch_add(1);
                // Whoever sees the job still open here is counted; the owner closes it before it reads the count.
                if (open_.load() == job) take();
                inside_.fetch_sub(1);
                done = job;
                idle_since = clock::now();
            } else if (spins % 64 == 0 && clock::now() - idle_since > patience) {
                std::unique_lock<std::mutex> lock(mutex_);
                sleeping_.fetch_add(1);
                wake_.wait(lock, [&] { return open_.load() != 0 && open_.load() != done; });
                sleeping_.fetch_sub(1);
                idle_since = clock::now();
            } else {
                pause();
            }
        }
    }

    std::vector<std::thread> helpers_;
    std::mutex owner_, mutex_;
    std::condition_variable wake_;
    std::atomic<int> wanted_{0}, inside_{0}, sleeping_{0};
    std::atomic<uint64_t> open_{0};
    std::atomic<int64_t> next_{0};
    uint64_t job_ = 0;
    Call call_ = nullptr;
    const void *context_ = nullptr;
    int64_t size_ = 0, grain_ = 1;
    int alone_ = 0, penalty_ = 32, seen_ = 0;  // what the caller has learnt about its helpers
    int64_t chunks_ = 0, mine_ = 0;
};

}  // namespace

extern "C" void tile_pool_resize(int threads) { Pool::get().resize(std::max(threads, 1)); }
extern "C" int tile_pool_threads() { return Pool::get().threads(); }
extern "C" void tile_pool_run(Call call, const void *context, int64_t programs) { Pool::get().run(call, context, programs); }
