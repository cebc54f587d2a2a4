// Pages of large results: how the system is asked for them, and by whom they are found (Linux; elsewhere nothing).
#pragma once

#include <cstdint>

namespace qlk {

// Whether the system has yet to find pages for this memory, which is long enough that it matters.
bool is_new_memory(const void *memory, int64_t bytes);

// Ask for large pages for memory that nobody has touched yet, where their first write is cheap.
void want_large_pages(void *memory, int64_t bytes);

// Let the system find all pages that lie in this part of new memory at once, instead of one at each first write.
void find_pages(void *memory, int64_t bytes);

}  // namespace qlk
