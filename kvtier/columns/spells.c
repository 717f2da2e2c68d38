/* The loops of spells: what `kvtier.policy.spells` and `kvtier.policy.a2cr` do when pages are used, come or leave. As in table.h, False or
   a negative number says that nothing has changed and that the lines in Python are to do it: a kind that is not known yet, a page that is
   not what it should be. This file opens the columns; see spells.h. */
#include "spells.h"

/* The columns in the order of `Spells.attach`. */
enum {
    COLUMN_FACTS, COLUMN_KIND_OF, COLUMN_WORTH, COLUMN_HITS, COLUMN_CHANGE, COLUMN_ALIVE, COLUMN_COUNTED, COLUMN_PERIOD, COLUMN_EDGES,
    COLUMN_GHOSTS, COLUMN_COUNT_OF, COLUMN_GENERATION_OF, COLUMN_STEPS, COLUMN_GUARD, COLUMN_RING, COLUMN_COUNTS, COLUMN_CLOCK,
    COLUMN_MISSING, COLUMNS
};

static void spells_dealloc(PyObject *self) {
    Spells *s = (Spells *)self;
    PyTypeObject *type = Py_TYPE(self);
    while (s->held > 0) PyBuffer_Release(&s->columns[--s->held]);
    if (s->ranking && s->ranking->scorer == s) s->ranking->refresh = NULL, s->ranking->scorer = NULL;
    Py_XDECREF((PyObject *)s->ranking);
    Py_XDECREF(s->recent);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static Py_ssize_t cells_of(const Spells *s, int column) { return s->columns[column].len / 8; }

static bool is_power_of_two(Py_ssize_t cells) { return cells > 1 && !(cells & (cells - 1)); }

/* Whether every column has as many cells as those it goes with. */
static bool fits(const Spells *s) {
    const Py_ssize_t rows = s->ranking->pages + 1, kinds = cells_of(s, COLUMN_HITS) / AGES, cells = cells_of(s, COLUMN_GHOSTS) / GHOST_WORDS;
    const Py_ssize_t cohorts = cells_of(s, COLUMN_COUNTED);
    const struct {
        int column;
        Py_ssize_t cells;
    } wanted[] = {
        {COLUMN_FACTS, rows * FACTS}, {COLUMN_WORTH, kinds * AGES},
        {COLUMN_HITS, kinds * AGES}, {COLUMN_CHANGE, kinds * (AGES + 1)}, {COLUMN_ALIVE, cohorts * kinds}, {COLUMN_PERIOD, PERIOD_CELLS},
        {COLUMN_EDGES, AGES + 1}, {COLUMN_GHOSTS, cells * GHOST_WORDS}, {COLUMN_STEPS, STEPS},
        {COLUMN_GUARD, GUARD_CELLS}, {COLUMN_COUNTS, COUNT_CELLS}, {COLUMN_CLOCK, CLOCK_CELLS},
    };
    for (size_t i = 0; i < sizeof wanted / sizeof *wanted; i++) {
        if (cells_of(s, wanted[i].column) != wanted[i].cells) return false;
    }
    /* A page that continues none is of generation 1. */
    if (!cells_of(s, COLUMN_KIND_OF) || !cells_of(s, COLUMN_COUNT_OF) || cells_of(s, COLUMN_GENERATION_OF) < 2) return false;
    return kinds > 0 && cells_of(s, COLUMN_MISSING) > 0 && is_power_of_two(cells) && is_power_of_two(cohorts) && is_power_of_two(cells_of(s, COLUMN_RING));
}

static void *at(const Spells *s, int column) { return s->columns[column].buf; }

static void name_columns(Spells *s) {
    s->facts = at(s, COLUMN_FACTS), s->ghosts = at(s, COLUMN_GHOSTS);
    s->kind_of = at(s, COLUMN_KIND_OF), s->worth = at(s, COLUMN_WORTH), s->hits = at(s, COLUMN_HITS), s->change = at(s, COLUMN_CHANGE);
    s->alive = at(s, COLUMN_ALIVE), s->counted = at(s, COLUMN_COUNTED), s->period = at(s, COLUMN_PERIOD), s->edges = at(s, COLUMN_EDGES);
    s->count_of = at(s, COLUMN_COUNT_OF), s->generation_of = at(s, COLUMN_GENERATION_OF), s->steps = at(s, COLUMN_STEPS);
    s->guard = at(s, COLUMN_GUARD), s->ring = at(s, COLUMN_RING), s->counts = at(s, COLUMN_COUNTS), s->clock = at(s, COLUMN_CLOCK);
    s->missing = at(s, COLUMN_MISSING);
    s->pages = s->ranking->pages, s->numbers = cells_of(s, COLUMN_KIND_OF), s->kinds = cells_of(s, COLUMN_HITS) / AGES;
    s->cohorts = cells_of(s, COLUMN_COUNTED), s->cells = cells_of(s, COLUMN_GHOSTS) / GHOST_WORDS, s->calls = cells_of(s, COLUMN_RING);
    s->uses_told_apart = cells_of(s, COLUMN_COUNT_OF), s->generations = cells_of(s, COLUMN_GENERATION_OF);
    s->most_missing = cells_of(s, COLUMN_MISSING) - 1;
    for (s->shift = 64; (Py_ssize_t)1 << (64 - s->shift) < s->cells; s->shift--) continue;
}

static bool open_columns(Spells *s, PyObject *arguments) {
    PyObject *ranking = PyTuple_GetItem(arguments, 0);
    if (!ranking || !(s->ranking = ranking_of(ranking))) return false;
    Py_INCREF(ranking);
    PyObject *recent = PyTuple_GetItem(arguments, 1);
    if (!recent || !PyDict_Check(recent)) {
        PyErr_SetString(PyExc_TypeError, "recent calls are a dict");
        return false;
    }
    Py_INCREF(recent);
    s->recent = recent;
    for (; s->held < COLUMNS; s->held++) {
        PyObject *array = PyTuple_GetItem(arguments, s->held + 2);
        if (!array || PyObject_GetBuffer(array, &s->columns[s->held], PyBUF_C_CONTIGUOUS | PyBUF_WRITABLE)) return false;
        if (s->columns[s->held].itemsize == 8 && (uintptr_t)s->columns[s->held].buf % 8 == 0) continue;
        PyErr_SetString(PyExc_ValueError, "a column of spells has cells of 8 bytes");
        s->held++;
        return false;
    }
    bool good = fits(s);
    for (int i = 0; good && i < STEPS; i++) good = ((int64_t *)at(s, COLUMN_STEPS))[i] > 0;
    if (!good) PyErr_SetString(PyExc_ValueError, "columns of spells do not fit each other");
    return good;
}

static PyObject *spells_new(PyTypeObject *type, PyObject *arguments, PyObject *named) {
    (void)named;
    if (expect_arguments("Spells(ranking, recent, records, ..., missing)", PyTuple_Size(arguments), COLUMNS + 2)) return NULL;
    Spells *s = (Spells *)PyType_GenericAlloc(type, 0);
    if (!s) return NULL;
    if (!open_columns(s, arguments)) {
        Py_DECREF(s);
        return NULL;
    }
    name_columns(s);
    s->ranking->scorer = s;
    s->ranking->refresh = spells_refresh;
    return (PyObject *)s;
}

static PyMethodDef methods[] = {
    {"touch", FAST(touch), NULL}, {"insert", FAST(insert), NULL}, {"remember", remember, METH_O, NULL},
    {"settle", FAST(settle), NULL}, {"give_way", FAST(give_way), NULL}, {"score_all", score_all, METH_NOARGS, NULL}, {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, spells_new},
    {Py_tp_dealloc, spells_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec spells_spec = {"kvtier.columns._loops.Spells", sizeof(Spells), 0, Py_TPFLAGS_DEFAULT, slots};
