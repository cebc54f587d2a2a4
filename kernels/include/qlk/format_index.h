/* Number formats by name, for both libraries. */
#ifndef QLK_FORMAT_INDEX_H
#define QLK_FORMAT_INDEX_H

#include <cstring>

#include "qlk/tables.h"

namespace qlk {

/* The index of a format in FORMATS; -1: there is none of that name. */
inline int format_index(const char *name) {
    for (int index = 0; name != nullptr && index < FORMAT_COUNT; ++index) {
        if (std::strcmp(name, FORMATS[index].name) == 0) return index;
    }
    return -1;
}

}  // namespace qlk
#endif
