/* The kernels for any CPU. */
#include "half.h"
#include "shape.h"
#include "tables.h"

#include "lanes_portable.h"

#include "kernels.h"

const Kernels portable_kernels = KERNELS("portable");
