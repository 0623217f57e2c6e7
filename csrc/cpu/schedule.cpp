#include "schedule.h"

#include <algorithm>

namespace mcl {
namespace {

// Nearly equal parts of `size` elements, of about `max_length` each. All but the last are multiples of GRAIN.
struct Blocks {
  static constexpr int64_t GRAIN = 48;  // a multiple of a micro-kernel's 6 rows and of a vector's 16 columns
  int64_t begin, size, count;
  Blocks(int64_t begin, int64_t size, int64_t max_length)
      : begin(begin), size(size), count((size + max_length - 1) / max_length) {}
  int64_t start(int64_t block) const {
    const int64_t grains = (size + GRAIN - 1) / GRAIN;
    return begin + std::min(size, grains * block / count * GRAIN);
  }
  int64_t length(int64_t block) const { return start(block + 1) - start(block); }
};

// The tasks of each segment fall into rounds in which no two tasks share a block. Rounds of different segments run side
// by side, ordered by the number of rounds that follow in their segment: long chains begin first, and tasks seldom
// wait.
class Rounds {
 public:
  // The upper triangle of `blocks` against themselves, as a round-robin tournament: each block is paired with every
  // other block once. Its pair with itself takes its idle round, or a last round of all blocks if their number is even.
  void add_triangle(const Blocks& blocks) {
    const int64_t players = blocks.count % 2 ? blocks.count : blocks.count - 1;  // blocks that rotate
    for (int64_t round = 0; round < players; round++) {
      const int64_t left = blocks.count - round;
      add_pair(left, blocks, round, players < blocks.count ? players : round);
      for (int64_t k = 1; k <= players / 2; k++)
        add_pair(left, blocks, (round + k) % players, (round - k + players) % players);
    }
    if (players < blocks.count)
      for (int64_t block = 0; block < blocks.count; block++) add_pair(1, blocks, block, block);
  }

  // All pairs of row and column blocks, as a Latin square.
  void add_rectangle(const Blocks& rows, const Blocks& columns) {
    const int64_t size = std::max(rows.count, columns.count);
    for (int64_t round = 0; round < size; round++)
      for (int64_t row = 0; row < rows.count; row++) {
        const int64_t column = (row + round) % size;
        if (column < columns.count) add(size - round, rows, row, columns, column, false);
      }
  }

  Schedule schedule(int64_t queries, int64_t keys, bool self) {
    // The smallest tasks run last, so that all threads finish at about the same time.
    const auto cost = [](const Task& task) { return task.rows * task.columns / (task.diagonal ? 2 : 1); };
    if (!rounds_.empty())
      std::stable_sort(rounds_[0].begin(), rounds_[0].end(),
                       [&](const Task& a, const Task& b) { return cost(a) > cost(b); });

    Schedule result;
    result.visited_queries.resize(queries);
    result.visited_keys.resize(self ? 0 : keys);
    // The last task of each block, at the first row of the block.
    std::vector<int64_t> last_query_task(queries, NO_TASK), last_key_task(self ? 0 : keys, NO_TASK);
    std::vector<int64_t>& last_column_task = self ? last_query_task : last_key_task;
    std::vector<bool>& visited_columns = self ? result.visited_queries : result.visited_keys;
    for (auto round = rounds_.rbegin(); round != rounds_.rend(); ++round) {
      for (Task& task : *round) {
        int64_t& last_of_rows = last_query_task[task.row_begin];
        int64_t& last_of_columns = last_column_task[task.column_begin];
        task.previous_of_rows = last_of_rows;
        task.previous_of_columns = last_of_columns;
        last_of_rows = last_of_columns = result.tasks.size();
        result.tasks.push_back(task);
        result.max_rows = std::max(result.max_rows, task.rows);
        result.max_columns = std::max(result.max_columns, task.columns);
        // Tasks of a block have all of its rows, so the first of them marks the block.
        if (task.previous_of_rows == NO_TASK)
          std::fill_n(result.visited_queries.begin() + task.row_begin, task.rows, true);
        if (task.previous_of_columns == NO_TASK)
          std::fill_n(visited_columns.begin() + task.column_begin, task.columns, true);
      }
      result.max_concurrent = std::max<int64_t>(result.max_concurrent, round->size());
      std::vector<Task>().swap(*round);
    }
    return result;
  }

 private:
  std::vector<std::vector<Task>> rounds_;  // by the number of later rounds in their segment

  // `left`: the number of rounds left in the segment, this one included.
  void add(int64_t left, const Blocks& rows, int64_t row, const Blocks& columns, int64_t column, bool diagonal) {
    if (left > int64_t(rounds_.size())) rounds_.resize(left);
    rounds_[left - 1].push_back({rows.start(row), rows.length(row), columns.start(column), columns.length(column),
                                 diagonal, NO_TASK, NO_TASK});
  }

  void add_pair(int64_t left, const Blocks& blocks, int64_t a, int64_t b) {
    add(left, blocks, std::min(a, b), blocks, std::max(a, b), a == b);
  }
};

// Rows of the largest blocks for which the longest chain of dependent tasks is at most 1 / enough_tasks of all work.
int64_t block_size(const std::vector<Segment>& segments, bool self, int64_t enough_tasks) {
  constexpr int64_t MIN_ROWS = 96, MAX_ROWS = 1024;
  for (int64_t size = MAX_ROWS;; size = size * 3 / 4) {
    // In pairs of rows: all work, and the longest chain of rounds of one segment.
    double work = 0, chain = 0;
    for (const Segment& segment : segments) {
      const double queries = segment.queries, keys = segment.keys;
      const double rows = std::min<double>(queries, size), columns = std::min<double>(keys, size);
      work += self ? queries * queries / 2 : queries * keys;
      if (self)
        chain = std::max(chain, queries <= size ? queries * queries / 2 : queries * rows);
      else
        chain = std::max(chain, std::max(queries / rows, keys / columns) * rows * columns);
    }
    if (chain * enough_tasks <= work || size <= MIN_ROWS) return std::max(size, MIN_ROWS);
  }
}

}  // namespace

Schedule make_schedule(const std::vector<Segment>& segments, int64_t queries, int64_t keys, bool self,
                       int64_t enough_tasks) {
  Rounds rounds;
  const int64_t size = block_size(segments, self, enough_tasks);
  for (const Segment& segment : segments) {
    const Blocks rows(segment.query_begin, segment.queries, size), columns(segment.key_begin, segment.keys, size);
    if (!self)
      rounds.add_rectangle(rows, columns);
    else if (segment.queries > 1)
      rounds.add_triangle(rows);
  }
  return rounds.schedule(queries, keys, self);
}

}  // namespace mcl
