// What bilinear.h and kernels_impl.h use. Those two come after the instructions are enabled: vector
// operations of a function are expanded for the instructions that it was defined with.
#pragma once

#include <c10/util/BFloat16.h>
#include <c10/util/Half.h>

#include <cstdint>
#include <type_traits>

#include "kernels.h"
