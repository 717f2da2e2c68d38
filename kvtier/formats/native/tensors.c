/* See tensors.h. The structures are those of https://github.com/dmlc/dlpack, whose layout is fixed for version 1. */
#include "tensors.h"

enum { MAJOR = 1, CPU = 1, FLOAT = 2, BFLOAT = 4, AXES = 6 };

typedef struct {
    void *data;
    int32_t device_type, device_id, axes;
    uint8_t code, bits;
    uint16_t lanes;
    int64_t *sizes, *strides;
    uint64_t byte_offset;
} Tensor;

typedef struct {
    uint32_t major, minor;
    void *older;
    void (*unused[3])(void);
    int (*tensor_of)(void *object, Tensor *tensor); /* borrowed, for as long as the object lives */
} Exchange;

static bool is_of_plan(const Tensor *tensor, const Plan *plan, Py_ssize_t count) {
    static const struct {
        uint8_t code, bits;
    } kinds[DTYPES] = {[BF16] = {BFLOAT, 16}, [FP16] = {FLOAT, 16}, [FP32] = {FLOAT, 32}};
    const Shape *const shape = &plan->shape;
    const int64_t sizes[AXES] = {count, plan->layers, plan->planes, shape->tokens, shape->heads, shape->head_dim};
    if (tensor->device_type != CPU || tensor->axes != AXES || tensor->lanes != 1) return false;
    if (tensor->code != kinds[shape->dtype].code || tensor->bits != kinds[shape->dtype].bits) return false;
    if (((uintptr_t)tensor->data + tensor->byte_offset) % value_bytes(shape->dtype)) return false;
    int64_t stride = 1;
    for (int axis = AXES - 1; axis >= 0; axis--) {
        if (tensor->sizes[axis] != sizes[axis] || (sizes[axis] > 1 && tensor->strides[axis] != stride)) return false;
        stride *= sizes[axis];
    }
    return true;
}

/* Whether torch would negate what is read; the exchange does not say. */
static int is_negated(PyObject *is_neg, PyObject *pages) {
    PyObject *answer = PyObject_CallFunctionObjArgs(is_neg, pages, NULL);
    if (!answer) return -1;
    Py_DECREF(answer);
    return answer != Py_False;
}

int tensor_address(char **address, PyObject *expected, PyObject *pages, const Plan *plan, Py_ssize_t count) {
    if (!PyTuple_Check(expected) || PyTuple_Size(expected) != 3) {
        PyErr_SetString(PyExc_TypeError, "expected is (tensor type, its DLPack exchange, its is_neg)");
        return -1;
    }
    const Exchange *const exchange = PyCapsule_GetPointer(PyTuple_GetItem(expected, 1), "dlpack_exchange_api");
    if (!exchange) return -1;
    if (exchange->major != MAJOR || !exchange->tensor_of || (PyObject *)Py_TYPE(pages) != PyTuple_GetItem(expected, 0)) return 0;
    Tensor tensor;
    if (exchange->tensor_of(pages, &tensor)) {
        PyErr_Clear(); /* no memory, or none that it has a name for: whoever can do with that says so */
        return 0;
    }
    if (!is_of_plan(&tensor, plan, count)) return 0;
    const int negated = is_negated(PyTuple_GetItem(expected, 2), pages);
    if (negated) return negated < 0 ? -1 : 0;
    *address = (char *)tensor.data + tensor.byte_offset;
    return 1;
}
