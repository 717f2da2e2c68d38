/* The loops of the least-recently-used order: what `kvtier.policy.recency` and `kvtier.policy.lru` do with its columns and its journal. As
   in table.h, False or a negative number says that nothing has changed and that the method in Python is to do it. See order.h. */
#include "order.h"

#include <stdlib.h>

static void order_dealloc(PyObject *self) {
    Order *order = (Order *)self;
    PyTypeObject *type = Py_TYPE(self);
    while (order->held > 0) PyBuffer_Release(&order->columns[--order->held]);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static void *hold_column(Order *order, PyObject *columns, Py_ssize_t size, Py_ssize_t cells) {
    Py_buffer *column = &order->columns[order->held];
    PyObject *array = PyTuple_GetItem(columns, order->held);
    if (!array) return NULL;
    const int failed = column_open(column, array, size, cells);
    if (column->obj) order->held++;
    return failed ? NULL : column->buf;
}

static PyObject *order_new(PyTypeObject *type, PyObject *columns, PyObject *named) {
    (void)named;
    if (expect_arguments("Order(key, parent, children, last, unqueued, keys, times)", PyTuple_Size(columns), ORDER_COLUMNS)) return NULL;
    Order *order = (Order *)PyType_GenericAlloc(type, 0);
    if (!order) return NULL;
    bool good = (order->key = hold_column(order, columns, 8, -1));
    const Py_ssize_t cells = good ? order->columns[0].len / 8 : 0;
    order->pages = cells - 1;
    good = good && cells > 0 && (order->parent = hold_column(order, columns, 8, cells)) &&
           (order->children = hold_column(order, columns, 8, cells)) && (order->last = hold_column(order, columns, 8, cells)) &&
           (order->unqueued = hold_column(order, columns, 1, cells)) && (order->keys = hold_column(order, columns, 8, -1));
    order->room = good ? order->columns[5].len / 8 : 0;
    good = good && (order->times = hold_column(order, columns, 8, order->room));
    if (good) return (PyObject *)order;
    if (!PyErr_Occurred()) PyErr_SetString(PyExc_ValueError, "an order needs a cell for ROOT");
    Py_DECREF(order);
    return NULL;
}

int64_t order_place(const Order *order, PyObject *object, bool *failed) {
    const int64_t place = number_of(object, failed);
    if (!*failed && (place < 0 || place > order->room)) {
        PyErr_Format(PyExc_ValueError, "place %lld of a journal with room for %zd entries", (long long)place, order->room);
        *failed = true;
    }
    return place;
}

/* -- coming and being used -- */

bool order_may_come(const Order *order, const Links *links) {
    bool usual = links_possible(links, order->pages, DEEPEST);
    for (Py_ssize_t i = 0; usual && i < links->pages.count; i++) usual = order->key[*row_at(&links->pages, i)] == NOT_HERE;
    return usual;
}

void order_come(Order *order, const Links *links) {
    for (Py_ssize_t i = 0; i < links->pages.count; i++) {
        const int64_t page = *row_at(&links->pages, i), parent = *row_at(&links->parents, i);
        order->parent[page] = parent;
        order->key[page] = (DEEPEST - *row_at(&links->depths, i)) << PAGE_BITS | page;
        order->children[order_cell(order, parent)]++;
    }
}

bool order_may_queue(const Order *order, const Rows *pages, int64_t tail) {
    return pages->count <= order->room - tail && rows_within(pages, order->pages);
}

void order_queue(Order *order, const Rows *pages, int64_t tail, double time) {
    for (Py_ssize_t i = 0; i < pages->count; i++) {
        const int64_t page = *row_at(pages, i);
        order->last[page] = time;
        order->unqueued[page] = 0;
        order->keys[tail + i] = order->key[page];
        order->times[tail + i] = time;
    }
}

static PyObject *arrive(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    Links links;
    if (expect_arguments("arrive(pages, parents, depths)", given, 3) || !links_open(&links, arguments)) return NULL;
    const bool usual = order_may_come((Order *)self, &links);
    if (usual) order_come((Order *)self, &links);
    links_close(&links);
    return PyBool_FromLong(usual);
}

static PyObject *queue(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("queue(pages, tail, time)", given, 3)) return NULL;
    Order *order = (Order *)self;
    bool failed = false;
    const int64_t tail = order_place(order, arguments[1], &failed);
    const double time = real_of(arguments[2], &failed);
    Rows pages;
    if (failed || !rows_open(&pages, arguments[0], false)) return NULL;
    bool usual = order_may_queue(order, &pages, tail);
    for (Py_ssize_t i = 0; usual && i < pages.count; i++) usual = order->key[*row_at(&pages, i)] != NOT_HERE;
    if (usual) order_queue(order, &pages, tail, time);
    rows_close(&pages);
    return PyBool_FromLong(usual);
}

/* -- moments -- */

static inline bool is_alive(const Order *order, int64_t key, double time) {
    const Py_ssize_t page = order_cell(order, key & PAGE_MASK);
    return order->key[page] == key && order->last[page] == time;
}

/* Where the moment that begins at `start` ends, by halving. */
static int64_t moment_end(const Order *order, int64_t start, int64_t tail) {
    const double time = order->times[start];
    int64_t inside = start, outside = tail;
    while (outside - inside > 1) {
        const int64_t middle = inside + (outside - inside) / 2;
        if (order->times[middle] <= time) inside = middle;
        else outside = middle;
    }
    return outside;
}

static int by_key(const void *one, const void *other) {
    const int64_t first = *(const int64_t *)one, second = *(const int64_t *)other;
    return (first > second) - (first < second);
}

/* Sorts keys. Those of one request come in the order of its pages, the deepest last: turned round, they are sorted mostly. */
static void sort_keys(int64_t *keys, int64_t count) {
    bool falling = true, rising = true;
    for (int64_t i = 1; i < count && (falling || rising); i++) {
        falling &= keys[i] < keys[i - 1];
        rising &= keys[i] >= keys[i - 1];
    }
    if (rising) return;
    if (!falling) {
        qsort(keys, (size_t)count, sizeof *keys, by_key);
        return;
    }
    for (int64_t i = 0, j = count - 1; i < j; i++, j--) {
        const int64_t key = keys[i];
        keys[i] = keys[j];
        keys[j] = key;
    }
}

void order_sort(Order *order, int64_t start, int64_t tail, int64_t *head, int64_t *stop) {
    const double time = order->times[start];
    int64_t *const keys = order->keys, end = moment_end(order, start, tail);
    int64_t living = end, first = end;
    for (int64_t i = end - 1; i >= start; i--) {
        if (is_alive(order, keys[i], time)) keys[--living] = keys[i];
    }
    sort_keys(keys + living, end - living);
    for (int64_t i = end - 1; i >= living; i--) {
        if (first == end || keys[first] != keys[i]) keys[--first] = keys[i];
    }
    for (int64_t i = start; first < end && i < first; i++) keys[i] = keys[first];
    *head = first, *stop = end;
}

static PyObject *moment(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("moment(start, tail)", given, 2)) return NULL;
    Order *order = (Order *)self;
    bool failed = false;
    const int64_t start = order_place(order, arguments[0], &failed), tail = order_place(order, arguments[1], &failed);
    if (failed) return NULL;
    if (start >= tail) {
        PyErr_SetString(PyExc_ValueError, "the journal has no next moment");
        return NULL;
    }
    int64_t head, stop;
    order_sort(order, start, tail, &head, &stop);
    return Py_BuildValue("(LL)", (long long)head, (long long)stop);
}

/* -- leaving -- */

static PyObject *leaving(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("leaving(head, stop, time, keys, pages)", given, 5)) return NULL;
    Order *order = (Order *)self;
    bool failed = false;
    const int64_t head = order_place(order, arguments[0], &failed), stop = order_place(order, arguments[1], &failed);
    const double time = real_of(arguments[2], &failed);
    Rows keys, pages;
    if (failed || !rows_open(&keys, arguments[3], true)) return NULL;
    if (!rows_open(&pages, arguments[4], true)) {
        rows_close(&keys);
        return NULL;
    }
    const bool fits = keys.count >= stop - head && pages.count >= stop - head;
    int64_t count = 0, leave = INT64_MAX;
    for (int64_t i = head; fits && i < stop; i++) {
        const int64_t key = order->keys[i], page = order_cell(order, key & PAGE_MASK);
        if (page == order->pages || order->last[page] != time) continue;
        const Py_ssize_t parent = order_cell(order, order->parent[page]);
        *row_at(&keys, count) = key;
        *row_at(&pages, count++) = page;
        order->children[parent]--;
        if (order->unqueued[parent] && leave > count) leave = count; /* its turn is before that of the next page */
    }
    if (leave > count) leave = count;
    for (int64_t i = 0; i < leave; i++) {
        if (order->children[*row_at(&pages, i)]) leave = i;
    }
    for (int64_t i = 0; i < count; i++) order->children[order_cell(order, order->parent[*row_at(&pages, i)])]++;
    rows_close(&pages);
    rows_close(&keys);
    if (fits) return Py_BuildValue("(LL)", (long long)count, (long long)leave);
    PyErr_SetString(PyExc_ValueError, "less room for keys and pages than there are entries");
    return NULL;
}

static PyObject *step_over(PyObject *self, PyObject *array) {
    Order *order = (Order *)self;
    Rows keys;
    if (!rows_open(&keys, array, false)) return NULL;
    Py_ssize_t passed = 0;
    for (; passed < keys.count; passed++) {
        const Py_ssize_t page = order_cell(order, *row_at(&keys, passed) & PAGE_MASK);
        if (page == order->pages || !order->children[page]) break;
        order->unqueued[page] = 1;
    }
    rows_close(&keys);
    return PyLong_FromSsize_t(passed);
}

static PyObject *chain(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("chain(page, before_time, before_key, keys, times)", given, 5)) return NULL;
    const Order *order = (Order *)self;
    bool failed = false;
    int64_t page = number_of(arguments[0], &failed);
    const double before_time = real_of(arguments[1], &failed);
    const int64_t before_key = number_of(arguments[2], &failed);
    Rows keys;
    Py_buffer times;
    if (failed || !rows_open(&keys, arguments[3], true)) return NULL;
    if (column_open(&times, arguments[4], 8, keys.count)) {
        if (times.obj) PyBuffer_Release(&times);
        rows_close(&keys);
        return NULL;
    }
    Py_ssize_t count = 0;
    for (; count < keys.count && order_cell(order, page) != order->pages; count++) {
        const bool first = !count, sooner = order->last[page] < before_time;
        const bool next = order->unqueued[page] && order->children[page] == 1;
        if (!first && !(next && (sooner || (order->last[page] == before_time && order->key[page] < before_key)))) break;
        *row_at(&keys, count) = order->key[page];
        ((double *)times.buf)[count] = order->last[page];
        page = order->parent[page];
    }
    PyBuffer_Release(&times);
    rows_close(&keys);
    return PyLong_FromSsize_t(count);
}

static PyObject *leave(PyObject *self, PyObject *array) {
    Order *order = (Order *)self;
    Rows pages;
    if (!rows_open(&pages, array, false)) return NULL;
    const bool usual = rows_within(&pages, order->pages);
    for (Py_ssize_t i = 0; usual && i < pages.count; i++) {
        const int64_t page = *row_at(&pages, i);
        order->children[order_cell(order, order->parent[page])]--;
        order->key[page] = NOT_HERE;
        order->last[page] = -INFINITY;
        order->unqueued[page] = 0;
    }
    const Py_ssize_t parent = usual && pages.count ? order_cell(order, order->parent[*row_at(&pages, pages.count - 1)]) : order->pages;
    rows_close(&pages);
    if (!usual) {
        PyErr_SetString(PyExc_ValueError, "pages leave that the order has no room for");
        return NULL;
    }
    return PyLong_FromSsize_t(parent < order->pages && order->unqueued[parent] ? parent : ROOT);
}

static PyMethodDef methods[] = {
    {"arrive", FAST(arrive), NULL}, {"queue", FAST(queue), NULL},     {"moment", FAST(moment), NULL}, {"leaving", FAST(leaving), NULL},
    {"chain", FAST(chain), NULL}, {"step_over", step_over, METH_O, NULL}, {"leave", leave, METH_O, NULL},
    {"settle", FAST(order_settle), NULL}, {"give_way", FAST(order_give_way), NULL}, {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, order_new},
    {Py_tp_dealloc, order_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec order_spec = {"kvtier.columns._loops.Order", sizeof(Order), 0, Py_TPFLAGS_DEFAULT, slots};
