/* The loops of a ranking: what `kvtier.policy.ranking` does with its columns. Leaves are in a heap of page ids, each of which knows its
   place; what comes first is told by the columns alone (score, last touch, deepest first, id), so the order of leaving does not depend on
   how the heap happens to lie. As in table.h, False says that nothing has changed and that the method in Python is to do it. */
#include "ranking.h"

static void ranking_dealloc(PyObject *self) {
    Ranking *ranking = (Ranking *)self;
    PyTypeObject *type = Py_TYPE(self);
    while (ranking->held > 0) PyBuffer_Release(&ranking->columns[--ranking->held]);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

Ranking *ranking_of(PyObject *object) {
    if (PyType_GetSlot(Py_TYPE(object), Py_tp_dealloc) == (void *)ranking_dealloc) return (Ranking *)object;
    PyErr_Format(PyExc_TypeError, "%R where a ranking's loops were expected", (PyObject *)Py_TYPE(object));
    return NULL;
}

static PyObject *ranking_new(PyTypeObject *type, PyObject *columns, PyObject *named) {
    (void)named;
    if (expect_arguments("Ranking(seats, heap, numbers)", PyTuple_Size(columns), RANKING_COLUMNS)) return NULL;
    Ranking *ranking = (Ranking *)PyType_GenericAlloc(type, 0);
    if (!ranking) return NULL;
    void *cells[RANKING_COLUMNS];
    Py_ssize_t wanted[RANKING_COLUMNS] = {-1, -1, RANKING_NUMBERS};
    for (int i = 0; i < RANKING_COLUMNS; i++) {
        PyObject *array = PyTuple_GetItem(columns, i);
        Py_buffer *column = &ranking->columns[i];
        bool failed = !array || column_open(column, array, 8, wanted[i]);
        if (array && column->obj) ranking->held++;
        if (!i && !failed && (failed = column->len < (Py_ssize_t)sizeof(Seat) || column->len % (Py_ssize_t)sizeof(Seat))) {
            PyErr_SetString(PyExc_ValueError, "a ranking needs whole records, and one for ROOT");
        }
        if (failed) {
            Py_DECREF(ranking);
            return NULL;
        }
        if (!i) wanted[1] = column->len / (Py_ssize_t)sizeof(Seat);
        cells[i] = column->buf;
    }
    ranking->pages = wanted[1] - 1;
    ranking->seats = cells[0], ranking->heap = cells[1], ranking->numbers = cells[2];
    return (PyObject *)ranking;
}

/* -- the heap -- */

/* The number of queued pages and their places come from Python: out of range, they count as none. */
static inline int64_t size_of(const Ranking *r) { return ranking_cell(r, r->numbers[QUEUED]); }

static inline bool is_queued(const Ranking *r, int64_t page) {
    const int64_t place = r->seats[page].place;
    return place >= 0 && place < size_of(r) && r->heap[place] == page;
}

int64_t ranking_aside(const Ranking *r) { return ranking_cell(r, r->numbers[ASIDE]); }

static inline int64_t *cell_aside(const Ranking *r, int64_t place) { return &r->heap[r->pages - (UNQUEUED - 1 - place)]; }

static inline bool is_aside(const Ranking *r, int64_t page) {
    const int64_t place = r->seats[page].place;
    return place < UNQUEUED && place >= UNQUEUED - ranking_aside(r) && *cell_aside(r, place) == page;
}

static inline bool sooner(const Ranking *r, int64_t one, int64_t other) {
    if (r->seats[one].score != r->seats[other].score) return r->seats[one].score < r->seats[other].score;
    if (r->seats[one].last != r->seats[other].last) return r->seats[one].last < r->seats[other].last;
    if (r->seats[one].depth != r->seats[other].depth) return r->seats[one].depth > r->seats[other].depth;
    return one < other;
}

static inline void lay(Ranking *r, int64_t place, int64_t page) {
    r->heap[place] = page;
    r->seats[page].place = place;
}

static void rise(Ranking *r, int64_t place, int64_t page) {
    while (place > 0) {
        const int64_t above = (place - 1) / 2, other = ranking_cell(r, r->heap[above]);
        if (!sooner(r, page, other)) break;
        lay(r, place, other);
        place = above;
    }
    lay(r, place, page);
}

static void sink(Ranking *r, int64_t place, int64_t page) {
    const int64_t size = size_of(r);
    for (int64_t below = 2 * place + 1; below < size; below = 2 * place + 1) {
        int64_t other = ranking_cell(r, r->heap[below]);
        if (below + 1 < size && sooner(r, ranking_cell(r, r->heap[below + 1]), other)) other = ranking_cell(r, r->heap[++below]);
        if (!sooner(r, other, page)) break;
        lay(r, place, other);
        place = below;
    }
    lay(r, place, page);
}

/* The last that was set aside takes the place of this one. */
static void take_back(Ranking *r, int64_t page) {
    const int64_t place = r->seats[page].place, last = ranking_cell(r, *cell_aside(r, UNQUEUED - ranking_aside(r)));
    *cell_aside(r, place) = last;
    r->seats[last].place = place;
    r->seats[page].place = UNQUEUED;
    r->numbers[ASIDE] = ranking_aside(r) - 1;
}

void ranking_unqueue(Ranking *r, int64_t page) {
    if (is_aside(r, page)) take_back(r, page);
    if (!is_queued(r, page)) return;
    const int64_t place = r->seats[page].place, last = ranking_cell(r, r->heap[size_of(r) - 1]);
    r->numbers[QUEUED] = size_of(r) - 1;
    r->seats[page].place = UNQUEUED;
    if (last == page) return;
    rise(r, place, last);
    sink(r, r->seats[last].place, last);
}

static inline void refresh(Ranking *r, int64_t page) {
    if (r->refresh) r->refresh(r->scorer, page);
}

void ranking_enqueue(Ranking *r, int64_t page) { /* or find its place anew */
    refresh(r, page);
    if (is_queued(r, page)) {
        rise(r, r->seats[page].place, page);
        sink(r, r->seats[page].place, page);
    } else if (size_of(r) < r->pages) {
        if (is_aside(r, page)) take_back(r, page);
        r->numbers[QUEUED] = size_of(r) + 1;
        rise(r, r->numbers[QUEUED] - 1, page);
    }
}

void ranking_set_aside(Ranking *r, int64_t page) {
    ranking_unqueue(r, page);
    if (size_of(r) + ranking_aside(r) >= r->pages) return; /* they are no leaves, or not counted right */
    r->numbers[ASIDE] = ranking_aside(r) + 1;
    r->seats[page].place = UNQUEUED - ranking_aside(r);
    *cell_aside(r, r->seats[page].place) = page;
}

int64_t ranking_next_aside(const Ranking *r, int64_t *left) {
    while (*left > 0) {
        const Py_ssize_t page = ranking_cell(r, *cell_aside(r, UNQUEUED - (*left)--));
        if (page != r->pages && is_aside(r, page)) return page;
    }
    return -1;
}

void ranking_reorder(Ranking *r) {
    for (int64_t place = size_of(r) / 2 - 1; place >= 0; place--) sink(r, place, ranking_cell(r, r->heap[place]));
}

/* -- pages -- */

/* A page goes; its parent if that is here and so becomes a leaf, else -1. */
static int64_t unlink_page(Ranking *r, int64_t page) {
    r->seats[page].here = 0;
    r->numbers[PRESENT]--;
    const Py_ssize_t parent = ranking_cell(r, r->seats[page].parent);
    return --r->seats[parent].children == 0 && parent != r->pages && r->seats[parent].here ? parent : -1;
}

static void go(Ranking *r, int64_t page) {
    ranking_unqueue(r, page);
    const int64_t freed = unlink_page(r, page);
    if (freed >= 0) ranking_enqueue(r, freed);
}

void ranking_leave_first(Ranking *r, int64_t page) {
    const int64_t freed = unlink_page(r, page);
    r->seats[page].place = UNQUEUED;
    if (freed >= 0 && !is_queued(r, freed)) {
        refresh(r, freed);
        sink(r, 0, freed);
        return;
    }
    const int64_t size = size_of(r) - 1, last = ranking_cell(r, r->heap[size]);
    r->numbers[QUEUED] = size;
    if (size) sink(r, 0, last);
}

void ranking_come(Ranking *r, int64_t page) {
    r->seats[page].here = 1;
    r->numbers[PRESENT]++;
    const Py_ssize_t parent = ranking_cell(r, r->seats[page].parent);
    if (r->seats[parent].children++ == 0 && parent != r->pages) ranking_unqueue(r, parent);
    if (!r->seats[page].children) ranking_enqueue(r, page);
}

static PyObject *arrive(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    Links links;
    if (expect_arguments("arrive(pages, parents, depths)", given, 3) || !links_open(&links, arguments)) return NULL;
    Ranking *r = (Ranking *)self;
    const Py_ssize_t count = links.pages.count;
    bool usual = links_possible(&links, r->pages, INT64_MAX);
    for (Py_ssize_t i = 0; usual && i < count; i++) usual = !r->seats[*row_at(&links.pages, i)].here;
    for (Py_ssize_t i = count - 1; usual && i >= 0; i--) { /* the last first: then its parent is never queued on the way */
        const int64_t page = *row_at(&links.pages, i);
        r->seats[page].parent = *row_at(&links.parents, i);
        r->seats[page].depth = *row_at(&links.depths, i);
        ranking_come(r, page);
    }
    links_close(&links);
    return PyBool_FromLong(usual);
}

/* Runs `step` on pages that are all here (or all absent), backwards if asked to; False, and nothing done, if one is not. */
static PyObject *each(PyObject *self, PyObject *array, bool here, bool backwards, void (*step)(Ranking *, int64_t)) {
    Ranking *r = (Ranking *)self;
    Rows pages;
    if (!rows_open(&pages, array, false)) return NULL;
    bool usual = rows_within(&pages, r->pages);
    for (Py_ssize_t i = 0; usual && i < pages.count; i++) usual = (r->seats[*row_at(&pages, i)].here != 0) == here;
    for (Py_ssize_t i = 0; usual && i < pages.count; i++) step(r, *row_at(&pages, backwards ? pages.count - 1 - i : i));
    rows_close(&pages);
    return PyBool_FromLong(usual);
}

static void place_anew(Ranking *r, int64_t page) {
    if (!r->seats[page].children) ranking_enqueue(r, page);
}

static PyObject *leave(PyObject *self, PyObject *pages) { return each(self, pages, true, false, go); }
static PyObject *restore(PyObject *self, PyObject *pages) { return each(self, pages, false, true, ranking_come); }
static PyObject *rescored(PyObject *self, PyObject *pages) { return each(self, pages, true, false, place_anew); }
static PyObject *withdraw(PyObject *self, PyObject *pages) { return each(self, pages, true, false, ranking_unqueue); }

int64_t ranking_first(const Ranking *r) {
    const Py_ssize_t page = size_of(r) ? ranking_cell(r, r->heap[0]) : r->pages;
    return page != r->pages && is_queued(r, page) ? page : -1;
}

static PyObject *pop(PyObject *self, PyObject *array) {
    Ranking *r = (Ranking *)self;
    Rows out;
    if (!rows_open(&out, array, true)) return NULL;
    Py_ssize_t count = 0;
    int64_t aside = ranking_aside(r);
    for (int64_t page; (page = ranking_next_aside(r, &aside)) >= 0;) ranking_enqueue(r, page);
    for (int64_t page; count < out.count && (page = ranking_first(r)) >= 0; ranking_leave_first(r, page)) *row_at(&out, count++) = page;
    rows_close(&out);
    return PyLong_FromSsize_t(count);
}

static PyObject *rebuild(PyObject *self, PyObject *ignored) {
    (void)ignored;
    Ranking *r = (Ranking *)self;
    r->numbers[QUEUED] = r->numbers[ASIDE] = 0;
    for (Py_ssize_t page = 0; page < r->pages; page++) {
        if (!r->seats[page].here) continue;
        r->seats[page].place = UNQUEUED;
        if (!r->seats[page].children) lay(r, r->numbers[QUEUED]++, page);
    }
    ranking_reorder(r);
    Py_RETURN_NONE;
}

static PyMethodDef methods[] = {
    {"arrive", FAST(arrive), NULL}, {"leave", leave, METH_O, NULL}, {"restore", restore, METH_O, NULL}, {"rescored", rescored, METH_O, NULL},
    {"withdraw", withdraw, METH_O, NULL}, {"pop", pop, METH_O, NULL}, {"choose", FAST(ranking_choose), NULL}, {"rebuild", rebuild, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, ranking_new},
    {Py_tp_dealloc, ranking_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec ranking_spec = {"kvtier.columns._loops.Ranking", sizeof(Ranking), 0, Py_TPFLAGS_DEFAULT, slots};
