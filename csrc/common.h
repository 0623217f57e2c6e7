// Types of both trees, cpu and cuda. Every kernel includes them, so they are plain data.
#pragma once

namespace mcl {

enum class Dtype { float32, float64, bfloat16, float16 };

// Which labels match. Numbered as NEGATIVES in mcl_kernels/logsumexp/pairs.py.
enum class Negatives { same, different, all };

}  // namespace mcl
