/* The loops of spells: what `kvtier.policy.a2cr` does with columns of pages, of kinds (`kvtier.policy.reuse`) and of ghosts
   (`kvtier.policy.memory`) when pages are used, come, go on or leave. As in table.c, False or a negative number says that nothing has
   changed and that the lines in Python are to do it: a kind that is not known yet, a page that is not what it should be. */
#include "rows.h"

#include <stdlib.h>
#include <string.h>

enum { KIND, COHORT, USES, GENERATION, CALL, FACTS };
enum { FIRST, HELD, OWED, ROOM, FOLLOWS, GUARD_CELLS }; /* of `kvtier.policy.guard` */
enum { HERE, LAST, SCORE, COMBINED, PAGE_FACTS, NAME, KIND_OF, WORTH, HITS, CHANGE, ALIVE, COUNTED, EDGES, CELL_NAME, CELL_LAST, CELL_FACTS, COUNT_OF, GENERATION_OF, STEPS, GUARD, RING, COLUMNS };
enum { AGES = 56, BELOW = (1023 - 4) * 2 - 1, BITS = 51 };

typedef struct {
    PyObject_HEAD
    uint8_t *here;
    double *last, *score, *worth, *edges, *cell_last;
    int64_t *combined, *facts, *name, *kind_of, *hits, *change, *alive, *counted, *cell_name, *cell_facts, *count_of, *generation_of, *guard, *ring;
    Py_ssize_t pages, numbers, kinds, cohorts, cells, counts, generations, calls;
    int64_t end_step, new_step, attention, new_values;
    unsigned shift;
    int held;
    Py_buffer columns[COLUMNS];
} Spells;

static void spells_dealloc(PyObject *self) {
    Spells *spells = (Spells *)self;
    PyTypeObject *type = Py_TYPE(self);
    while (spells->held > 0) PyBuffer_Release(&spells->columns[--spells->held]);
    ((freefunc)PyType_GetSlot(type, Py_tp_free))(self);
    Py_DECREF(type);
}

static Py_ssize_t cells_of(const Spells *s, int column) { return s->columns[column].len / s->columns[column].itemsize; }

/* Whether every column has as many cells as those it goes with. */
static bool fits(const Spells *s) {
    static const int by_page[] = {LAST, SCORE, COMBINED, NAME};
    const Py_ssize_t rows = cells_of(s, HERE);
    bool good = rows > 0 && cells_of(s, PAGE_FACTS) == rows * FACTS && cells_of(s, EDGES) == AGES + 1 && cells_of(s, STEPS) == 4;
    for (int i = 0; i < 4; i++) good = good && cells_of(s, by_page[i]) == rows;
    const Py_ssize_t kinds = cells_of(s, HITS) / AGES, cells = cells_of(s, CELL_NAME);
    good = good && kinds > 0 && cells_of(s, HITS) == kinds * AGES && cells_of(s, WORTH) == kinds * AGES;
    good = good && cells_of(s, CHANGE) == kinds * (AGES + 1) && cells_of(s, COUNTED) > 0 && cells_of(s, ALIVE) == cells_of(s, COUNTED) * kinds;
    good = good && cells > 1 && !(cells & (cells - 1)) && cells_of(s, CELL_LAST) == cells && cells_of(s, CELL_FACTS) == cells * FACTS;
    good = good && cells_of(s, GUARD) == GUARD_CELLS && cells_of(s, RING) > 1;
    return good && cells_of(s, COUNT_OF) > 0 && cells_of(s, GENERATION_OF) > 0 && cells_of(s, KIND_OF) > 0;
}

static PyObject *spells_new(PyTypeObject *type, PyObject *columns, PyObject *named) {
    (void)named;
    if (expect_arguments("Spells(here, last, ..., steps)", PyTuple_Size(columns), COLUMNS)) return NULL;
    Spells *s = (Spells *)PyType_GenericAlloc(type, 0);
    if (!s) return NULL;
    for (int i = 0; i < COLUMNS; i++) {
        PyObject *array = PyTuple_GetItem(columns, i);
        const int failed = !array || column_open(&s->columns[i], array, i == HERE ? 1 : 8, -1);
        if (array && s->columns[i].obj) s->held++;
        if (failed) {
            Py_DECREF(s);
            return NULL;
        }
    }
    const int64_t *steps = s->columns[STEPS].buf;
    if (!fits(s) || steps[0] < 1 || steps[1] < 1 || steps[2] < 1 || steps[3] < 1) {
        PyErr_SetString(PyExc_ValueError, "columns of spells do not fit each other");
        Py_DECREF(s);
        return NULL;
    }
    s->here = s->columns[HERE].buf, s->last = s->columns[LAST].buf, s->score = s->columns[SCORE].buf;
    s->combined = s->columns[COMBINED].buf, s->facts = s->columns[PAGE_FACTS].buf, s->guard = s->columns[GUARD].buf, s->ring = s->columns[RING].buf;
    s->name = s->columns[NAME].buf, s->kind_of = s->columns[KIND_OF].buf, s->worth = s->columns[WORTH].buf;
    s->hits = s->columns[HITS].buf, s->change = s->columns[CHANGE].buf, s->alive = s->columns[ALIVE].buf;
    s->counted = s->columns[COUNTED].buf, s->edges = s->columns[EDGES].buf, s->cell_name = s->columns[CELL_NAME].buf;
    s->cell_last = s->columns[CELL_LAST].buf, s->cell_facts = s->columns[CELL_FACTS].buf;
    s->count_of = s->columns[COUNT_OF].buf, s->generation_of = s->columns[GENERATION_OF].buf;
    s->pages = cells_of(s, HERE) - 1, s->numbers = cells_of(s, KIND_OF), s->kinds = cells_of(s, HITS) / AGES;
    s->cohorts = cells_of(s, COUNTED), s->cells = cells_of(s, CELL_NAME);
    s->calls = cells_of(s, RING), s->counts = cells_of(s, COUNT_OF), s->generations = cells_of(s, GENERATION_OF);
    s->end_step = steps[0], s->new_step = steps[1], s->attention = steps[2], s->new_values = steps[3];
    for (s->shift = 64; (Py_ssize_t)1 << (64 - s->shift) < s->cells; s->shift--) continue;
    return (PyObject *)s;
}

static int age_bin(double age) {
    int64_t bits;
    memcpy(&bits, &age, sizeof bits);
    const int64_t bin = (bits >> BITS) - BELOW;
    return bin < 0 ? 0 : bin >= AGES ? AGES - 1 : (int)bin;
}

/* -1 for features that make no known kind. */
static int64_t kind_of(const Spells *s, int64_t combined) {
    const int64_t kind = (uint64_t)combined < (uint64_t)s->numbers ? s->kind_of[combined] : -1;
    return kind < s->kinds ? kind : -1;
}

static bool is_sound(const Spells *s, const int64_t *facts) {
    return (uint64_t)facts[KIND] < (uint64_t)s->kinds && facts[COHORT] >= 0 && (uint64_t)facts[GENERATION] < (uint64_t)s->generations &&
           facts[USES] >= 0;
}

static int64_t features(const Spells *s, int64_t uses, int64_t generation) {
    return s->count_of[uses < s->counts ? uses : s->counts - 1] + s->generation_of[generation];
}

static void end(Spells *s, const int64_t *facts, int bin, int64_t cohort) {
    if (facts[COHORT] <= cohort - s->cohorts) return;
    const Py_ssize_t row = facts[COHORT] % s->cohorts;
    const int64_t kind = facts[KIND];
    s->alive[row * s->kinds + kind]--;
    s->hits[kind * AGES + bin]++;
    const int64_t start = s->counted[row];
    if (start < 0 || start > bin) return;
    s->change[kind * (AGES + 1) + start]++;
    s->change[kind * (AGES + 1) + bin + 1]--;
}

static void begin(Spells *s, int64_t page, int64_t combined, int64_t kind, double time, int64_t call, int64_t cohort) {
    s->combined[page] = combined;
    s->facts[page * FACTS + KIND] = kind;
    s->facts[page * FACTS + COHORT] = cohort;
    s->last[page] = time;
    s->score[page] = s->guard[FOLLOWS] ? 0.0 : s->worth[kind * AGES];
    s->facts[page * FACTS + CALL] = call;
    s->alive[cohort % s->cohorts * s->kinds + kind]++;
}

/* Whether LRU would hold a page last used by that call, which it does not any more. */
static bool was_held(Spells *s, int64_t call) {
    if (call < 0 || call < s->guard[FIRST]) return false;
    s->ring[call % s->calls]--;
    s->guard[HELD]--;
    return true;
}

/* So many pages were used by this call: LRU holds them, and others no more. */
static void count(Spells *s, Py_ssize_t pages, int64_t call) {
    int64_t *guard = s->guard;
    s->ring[call % s->calls] += pages;
    guard[HELD] += pages;
    for (; guard[FIRST] < call && (guard[HELD] > guard[ROOM] || call - guard[FIRST] >= s->calls - 1); guard[FIRST]++) {
        guard[HELD] -= s->ring[guard[FIRST] % s->calls];
        s->ring[guard[FIRST] % s->calls] = 0;
    }
}

/* The worth of a page at its age, between two ages in proportion. */
static double worth(const Spells *s, int64_t page, double now) {
    const double age = now - s->last[page];
    const int bin = age_bin(age), next = bin + 1 < AGES ? bin + 1 : AGES - 1;
    const double *of_kind = s->worth + s->facts[page * FACTS + KIND] * AGES;
    const double share = bin ? (age - s->edges[bin]) / (s->edges[bin + 1] - s->edges[bin]) : 0.0;
    return of_kind[bin] + (of_kind[next] - of_kind[bin]) * share;
}

static PyObject *use(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("use(pages, time, call, cohort)", given, 4)) return NULL;
    Spells *s = (Spells *)self;
    bool failed = false;
    const double time = PyFloat_AsDouble(arguments[1]);
    if (time == -1 && PyErr_Occurred()) return NULL;
    const int64_t call = number_of(arguments[2], &failed), cohort = number_of(arguments[3], &failed);
    Rows pages;
    if (failed || !rows_open(&pages, arguments[0], false)) return NULL;
    bool usual = cohort >= 0 && call >= 0 && s->guard[FIRST] >= 0 && rows_within(&pages, s->pages);
    for (Py_ssize_t i = 0; usual && i < pages.count; i++) {
        const int64_t page = *row_at(&pages, i), *facts = s->facts + page * FACTS;
        usual = s->here[page] && is_sound(s, facts) && s->combined[page] >= 0;
        if (usual) usual = kind_of(s, features(s, facts[USES] + 1, facts[GENERATION]) + s->combined[page] % s->attention) >= 0;
    }
    for (Py_ssize_t i = 0; usual && i < pages.count; i++) {
        const int64_t page = *row_at(&pages, i);
        int64_t *facts = s->facts + page * FACTS;
        end(s, facts, age_bin(time - s->last[page]), cohort);
        if (!was_held(s, facts[CALL])) s->guard[OWED]--;
        const int64_t combined = features(s, ++facts[USES], facts[GENERATION]) + s->combined[page] % s->attention;
        begin(s, page, combined, kind_of(s, combined), time, call, cohort);
    }
    if (usual) count(s, pages.count, call);
    rows_close(&pages);
    return PyBool_FromLong(usual);
}

/* The cell in which a name is remembered, -1 if in none. */
static Py_ssize_t find(const Spells *s, int64_t name, Py_ssize_t first) {
    for (int way = 0; way < 2; way++) {
        const Py_ssize_t cell = first ^ way;
        if (s->cell_name[cell] == name && s->cell_last[cell] != -INFINITY) return cell;
    }
    return -1;
}

static Py_ssize_t first_cell(const Spells *s, int64_t name) { return (Py_ssize_t)(((uint64_t)name * 0x9E3779B97F4A7C15u) >> s->shift); }

static PyObject *come(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("come(pages, names, time, call, cohort, generation, deepest)", given, 7)) return NULL;
    Spells *s = (Spells *)self;
    bool failed = false;
    const double time = PyFloat_AsDouble(arguments[2]);
    if (time == -1 && PyErr_Occurred()) return NULL;
    const int64_t call = number_of(arguments[3], &failed), cohort = number_of(arguments[4], &failed);
    const int64_t generation = number_of(arguments[5], &failed), deepest = number_of(arguments[6], &failed);
    Rows pages, names;
    if (failed || !rows_open(&pages, arguments[0], false)) return NULL;
    if (!rows_open(&names, arguments[1], false)) {
        rows_close(&pages);
        return NULL;
    }
    bool usual = names.count == pages.count && cohort >= 0 && call >= 0 && s->guard[FIRST] >= 0 && rows_within(&pages, s->pages);
    usual = usual && (uint64_t)generation < (uint64_t)s->generations;
    int64_t unknown = 0, new = 0;
    for (Py_ssize_t i = 0; usual && i < pages.count; i++) unknown += find(s, *row_at(&names, i), first_cell(s, *row_at(&names, i))) < 0;
    while (new < s->new_values - 1 && unknown >> new) new++;
    new *= s->new_step;
    for (int pass = 0; usual && pass < 2; pass++) {
        for (Py_ssize_t i = 0; usual && i < pages.count; i++) {
            const int64_t page = *row_at(&pages, i), name = *row_at(&names, i), ended = i == deepest ? s->end_step : 0;
            const Py_ssize_t cell = find(s, name, first_cell(s, name));
            const int64_t *ghost = cell < 0 ? NULL : s->cell_facts + cell * FACTS;
            if (!pass) usual = s->here[page] && (!ghost || is_sound(s, ghost));
            if (!usual) break;
            const int64_t uses = ghost ? ghost[USES] + 1 : 1, made = ghost ? ghost[GENERATION] : generation;
            const int64_t combined = features(s, uses, made) + new + ended, kind = kind_of(s, combined);
            if (!pass) {
                usual = kind >= 0;
                continue;
            }
            if (ghost) {
                end(s, ghost, age_bin(time > s->cell_last[cell] ? time - s->cell_last[cell] : 0.0), cohort);
                if (was_held(s, ghost[CALL])) s->guard[OWED]++;
                s->cell_last[cell] = -INFINITY;
            }
            s->name[page] = name;
            s->facts[page * FACTS + USES] = uses;
            s->facts[page * FACTS + GENERATION] = made;
            begin(s, page, combined, kind, time, call, cohort);
        }
    }
    if (usual) count(s, pages.count, call);
    rows_close(&names);
    rows_close(&pages);
    return PyLong_FromLongLong(usual ? new : -1);
}

static PyObject *go_on(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    if (expect_arguments("go_on(pages, new, time)", given, 3)) return NULL;
    Spells *s = (Spells *)self;
    bool failed = false;
    const int64_t new = number_of(arguments[1], &failed);
    const double time = PyFloat_AsDouble(arguments[2]);
    Rows pages;
    if (failed || (time == -1 && PyErr_Occurred()) || !rows_open(&pages, arguments[0], false)) return NULL;
    bool usual = new >= 0 && rows_within(&pages, s->pages);
    for (int pass = 0; usual && pass < 2; pass++) {
        for (Py_ssize_t i = 0; usual && i < pages.count; i++) {
            const int64_t page = *row_at(&pages, i), before = s->combined[page];
            const int64_t after = before + new - before / s->new_step % s->new_values * s->new_step, kind = kind_of(s, after);
            int64_t *facts = s->facts + page * FACTS;
            if (!pass) {
                usual = s->here[page] && kind >= 0 && before >= 0 && is_sound(s, facts);
                continue;
            }
            int64_t *alive = s->alive + facts[COHORT] % s->cohorts * s->kinds;
            alive[facts[KIND]]--;
            alive[kind]++;
            s->combined[page] = after;
            facts[KIND] = kind;
            if (!s->guard[FOLLOWS]) s->score[page] = worth(s, page, time);
        }
    }
    rows_close(&pages);
    return PyBool_FromLong(usual);
}

static PyObject *leave(PyObject *self, PyObject *array) {
    Spells *s = (Spells *)self;
    Rows pages;
    if (!rows_open(&pages, array, false)) return NULL;
    int64_t *chosen = malloc(sizeof *chosen * (size_t)(pages.count + 1));
    const bool usual = chosen && rows_within(&pages, s->pages);
    for (Py_ssize_t i = 0; usual && i < pages.count; i++) { /* by the times as they were before any of them left */
        const Py_ssize_t cell = first_cell(s, s->name[*row_at(&pages, i)]), other = cell ^ 1;
        chosen[i] = s->cell_last[other] < s->cell_last[cell] ? other : cell;
    }
    for (Py_ssize_t i = 0; usual && i < pages.count; i++) {
        const int64_t page = *row_at(&pages, i);
        s->cell_name[chosen[i]] = s->name[page];
        s->cell_last[chosen[i]] = s->last[page];
        memcpy(s->cell_facts + chosen[i] * FACTS, s->facts + page * FACTS, sizeof(int64_t) * FACTS);
    }
    free(chosen);
    rows_close(&pages);
    return PyBool_FromLong(usual);
}

static Py_ssize_t next_here(const Spells *s, Py_ssize_t page) { return next_set(s->here, page, s->pages); }

static PyObject *score_all(PyObject *self, PyObject *now) {
    Spells *s = (Spells *)self;
    const double time = PyFloat_AsDouble(now);
    if (time == -1 && PyErr_Occurred()) return NULL;
    bool usual = true;
    for (Py_ssize_t page = next_here(s, 0); usual && page < s->pages; page = next_here(s, page + 1)) usual = is_sound(s, s->facts + page * FACTS);
    for (Py_ssize_t page = next_here(s, 0); usual && page < s->pages; page = next_here(s, page + 1)) s->score[page] = worth(s, page, time);
    return PyBool_FromLong(usual);
}

static PyMethodDef methods[] = {
    {"use", FAST(use), NULL}, {"come", FAST(come), NULL}, {"go_on", FAST(go_on), NULL}, {"leave", leave, METH_O, NULL},
    {"score_all", score_all, METH_O, NULL}, {NULL, NULL, 0, NULL},
};

static PyType_Slot slots[] = {
    {Py_tp_new, spells_new},
    {Py_tp_dealloc, spells_dealloc},
    {Py_tp_methods, methods},
    {0, NULL},
};

PyType_Spec spells_spec = {"kvtier.columns._loops.Spells", sizeof(Spells), 0, Py_TPFLAGS_DEFAULT, slots};
