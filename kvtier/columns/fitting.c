/* The loops of `kvtier.policy.hazards`, and of `kvtier.policy.reuse` over what is exposed: over all kinds and ages, and within a kind from
   every age to all later ones. Sums are taken in the order in which NumPy takes them: the numbers are the same to the last bit. */
#include "rows.h"

#include <string.h>

/* Compiled for wider registers, too, which divide twice as much at once; the C library chooses when the module is loaded. */
#if defined(__x86_64__) && defined(__GLIBC__) && defined(__GNUC__)
#define WIDE __attribute__((target_clones("avx2", "default")))
#else
#define WIDE
#endif

enum { AGES = 56, MOST_GRIDS = 8 };

/* Arrays of one call: C-contiguous, [rows, columns] of float64 ('d') or int64 ('q'). */
typedef struct {
    double *d;
    int64_t *q;
    Py_ssize_t rows, columns;
} Grid;

typedef struct {
    Py_buffer buffers[MOST_GRIDS];
    int opened;
} Grids;

static void grids_close(Grids *grids) {
    while (grids->opened > 0) PyBuffer_Release(&grids->buffers[--grids->opened]);
}

static bool grid_open(Grids *grids, Grid *grid, PyObject *array, char type) {
    Py_buffer *buffer = &grids->buffers[grids->opened];
    if (PyObject_GetBuffer(array, buffer, PyBUF_C_CONTIGUOUS | PyBUF_FORMAT | PyBUF_WRITABLE)) return false;
    grids->opened++;
    const char *format = buffer->format ? buffer->format : "B";
    const bool real = !strcmp(format, "d"), whole = !strcmp(format, "l") || !strcmp(format, "q");
    if ((type == 'd' ? !real : !whole) || buffer->ndim < 1 || buffer->ndim > 2 || (uintptr_t)buffer->buf % 8) {
        PyErr_Format(PyExc_ValueError, "an array of format %s with %d dimensions does not fit; expected %s", format, buffer->ndim,
                     type == 'd' ? "float64" : "int64");
        return false;
    }
    grid->d = buffer->buf, grid->q = buffer->buf;
    grid->columns = buffer->shape[buffer->ndim - 1];
    grid->rows = buffer->ndim == 2 ? buffer->shape[0] : 1;
    return true;
}

/* Opens as many arrays as `types` has letters; closed again, with an exception, if one is of another type. */
static bool grids_open(Grids *grids, Grid *grid, PyObject *const *arrays, const char *types) {
    grids->opened = 0;
    for (int i = 0; types[i]; i++) {
        if (grid_open(grids, &grid[i], arrays[i], types[i])) continue;
        grids_close(grids);
        return false;
    }
    return true;
}

static bool is_of(const Grid *grid, Py_ssize_t rows, Py_ssize_t columns) { return grid->rows == rows && grid->columns == columns; }

/* Whether every number is an index below `limit`. */
static bool are_below(const Grid *grid, Py_ssize_t limit) {
    bool below = true;
    for (Py_ssize_t i = 0; i < grid->rows * grid->columns; i++) below &= (uint64_t)grid->q[i] < (uint64_t)limit;
    return below;
}

/* The end of every call: None, or ValueError where the arrays did not fit each other. */
static PyObject *done(Grids *grids, bool good) {
    grids_close(grids);
    if (good) Py_RETURN_NONE;
    PyErr_SetString(PyExc_ValueError, "arrays of a fit do not fit each other");
    return NULL;
}

/* -- exposure -- */

/* The living spells of a cohort [kinds] have been exposed at the ages from `start` on, up to below `until`. */
static void reach(const int64_t *alive, int64_t *change, Py_ssize_t kinds, int64_t start, int64_t until) {
    for (Py_ssize_t kind = 0; kind < kinds; kind++) {
        if (!alive[kind]) continue; /* most of them: what follows is far apart in memory */
        change[kind * (AGES + 1) + start] += alive[kind];
        change[kind * (AGES + 1) + until] -= alive[kind];
    }
}

WIDE PyObject *expose(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Grids grids;
    Grid grid[8];
    const char *method = "expose(cohorts, reached, counted, alive, change, hits, all_exposed, all_hits)";
    if (expect_arguments(method, given, 8) || !grids_open(&grids, grid, arguments, "qqqqqqdd")) return NULL;
    const Grid *cohorts = &grid[0], *reached = &grid[1], *counted = &grid[2], *alive = &grid[3];
    int64_t *change = grid[4].q, *hits = grid[5].q;
    double *all_exposed = grid[6].d, *all_hits = grid[7].d;
    const Py_ssize_t kinds = grid[4].rows, count = cohorts->columns; /* `alive` has room for more */
    bool good = cohorts->rows == 1 && is_of(reached, 1, count) && is_of(counted, 1, alive->rows) && are_below(cohorts, alive->rows);
    good = good && are_below(reached, AGES + 1) && kinds <= alive->columns && grid[4].columns == AGES + 1 && is_of(&grid[5], kinds, AGES);
    good = good && is_of(&grid[6], kinds, AGES) && is_of(&grid[7], kinds, AGES);
    for (Py_ssize_t i = 0; good && i < count; i++) {
        const int64_t cohort = cohorts->q[i], start = counted->q[cohort], until = reached->q[i];
        if (start < 0 || until <= start) continue;
        reach(alive->q + cohort * alive->columns, change, kinds, start, until);
        counted->q[cohort] = until;
    }
    for (Py_ssize_t kind = 0; good && kind < kinds; kind++) {
        int64_t exposed = 0;
        for (Py_ssize_t age = 0; age < AGES; age++) {
            exposed += change[kind * (AGES + 1) + age];
            all_exposed[kind * AGES + age] += (double)exposed;
            all_hits[kind * AGES + age] += (double)hits[kind * AGES + age];
        }
    }
    if (good) memset(change, 0, sizeof *change * (size_t)(kinds * (AGES + 1)));
    if (good) memset(hits, 0, sizeof *hits * (size_t)(kinds * AGES));
    return done(&grids, good);
}

/* -- factors: `features` [kinds, features] has, for every kind and feature, a row of `factors` [values, ages] -- */

/* Into `out` [ages] what is expected of a kind by the factors of its features. */
static void multiply(const Grid *features, const Grid *factors, Py_ssize_t kind, double *out) {
    for (Py_ssize_t feature = 0; feature < features->columns; feature++) {
        const double *factor = factors->d + features->q[kind * features->columns + feature] * AGES;
        for (int age = 0; age < AGES; age++) out[age] *= factor[age];
    }
}

WIDE PyObject *expect(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Grids grids;
    Grid grid[5];
    const char *method = "expect(exposed, level, features, factors, expected)";
    if (expect_arguments(method, given, 5) || !grids_open(&grids, grid, arguments, "ddqdd")) return NULL;
    const Grid *features = &grid[2], *factors = &grid[3];
    const Py_ssize_t kinds = features->rows;
    bool good = is_of(&grid[0], kinds, AGES) && is_of(&grid[1], 1, AGES) && is_of(&grid[4], kinds, AGES) && factors->columns == AGES;
    good = good && are_below(features, factors->rows);
    for (Py_ssize_t kind = 0; good && kind < kinds; kind++) {
        const double *exposed = grid[0].d + kind * AGES;
        double *expected = grid[4].d + kind * AGES;
        for (int age = 0; age < AGES; age++) expected[age] = exposed[age] * grid[1].d[age];
        multiply(features, factors, kind, expected);
    }
    return done(&grids, good);
}

WIDE PyObject *gather(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Grids grids;
    Grid grid[6];
    bool failed = false;
    const char *method = "gather(hits, expected, features, factors, seen, due, feature)";
    if (expect_arguments(method, given, 7)) return NULL;
    const int64_t feature = number_of(arguments[6], &failed);
    if (failed || !grids_open(&grids, grid, arguments, "ddqddd")) return NULL;
    const Grid *features = &grid[2], *factors = &grid[3];
    const Py_ssize_t kinds = features->rows;
    bool good = is_of(&grid[0], kinds, AGES) && is_of(&grid[1], kinds, AGES) && factors->columns == AGES;
    good = good && is_of(&grid[4], factors->rows, AGES) && is_of(&grid[5], factors->rows, AGES);
    good = good && are_below(features, factors->rows) && feature >= 0 && feature < features->columns;
    for (Py_ssize_t kind = 0; good && kind < kinds; kind++) {
        const Py_ssize_t value = features->q[kind * features->columns + feature] * AGES;
        const double *hits = grid[0].d + kind * AGES, *expected = grid[1].d + kind * AGES, *factor = factors->d + value;
        double *seen = grid[4].d + value, *due = grid[5].d + value;
        for (int age = 0; age < AGES; age++) seen[age] += hits[age];
        for (int age = 0; age < AGES; age++) due[age] += expected[age] / factor[age];
    }
    return done(&grids, good);
}

WIDE PyObject *rescale(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Grids grids;
    Grid grid[3];
    bool failed = false;
    if (expect_arguments("rescale(expected, features, ratios, feature)", given, 4)) return NULL;
    const int64_t feature = number_of(arguments[3], &failed);
    if (failed || !grids_open(&grids, grid, arguments, "dqd")) return NULL;
    const Grid *features = &grid[1], *ratios = &grid[2];
    bool good = is_of(&grid[0], features->rows, AGES) && ratios->columns == AGES && are_below(features, ratios->rows);
    good = good && feature >= 0 && feature < features->columns;
    for (Py_ssize_t kind = 0; good && kind < features->rows; kind++) {
        const double *ratio = ratios->d + features->q[kind * features->columns + feature] * AGES;
        double *expected = grid[0].d + kind * AGES;
        for (int age = 0; age < AGES; age++) expected[age] *= ratio[age];
    }
    return done(&grids, good);
}

/* -- worth: of as many kinds at a time as there are lanes, one in each -- */

enum { LANES = 4 };

/* One number of each of these kinds, and what a comparison of two says of each. Never handed over by value: where there are no registers as
   wide, that has no agreed way. */
typedef double Lanes __attribute__((vector_size(sizeof(double) * LANES)));
typedef int64_t Choice __attribute__((vector_size(sizeof(int64_t) * LANES)));

typedef struct {
    Lanes hazard[AGES], survival[AGES + 1], used[AGES + 1], kept[AGES + 1], best[AGES], chance[AGES];
} Curves;

/* Part of their caller, as what is compiled for wide registers must not call what is not. */
#define PART static inline __attribute__((always_inline)) void

/* Into `most` the larger of each pair. */
PART keep_larger(Lanes *most, const Lanes *others) {
    const Choice first = (Choice)(*most > *others);
    *most = (Lanes)((first & (Choice)*most) | (~first & (Choice)*others));
}

/* What becomes of spells with these hazards: the share that gets so old, was used by then, and the seconds that it was kept. */
PART follow(Curves *curves, const double *widths) {
    curves->survival[0] = (Lanes){0} + 1.0, curves->used[0] = curves->kept[0] = (Lanes){0};
    for (int age = 0; age < AGES; age++) {
        const Lanes survival = curves->survival[age], hazard = curves->hazard[age];
        curves->survival[age + 1] = survival * (1.0 - hazard);
        curves->used[age + 1] = curves->used[age] + survival * hazard;
        curves->kept[age + 1] = curves->kept[age] + survival * widths[age] * (1.0 - hazard / 2);
    }
    for (int age = 0; age < AGES; age++) curves->chance[age] = 1.0 - curves->survival[AGES] / curves->survival[age];
}

/* The steepest of the ways from every age below `last` to a later one, up to `last`, after which all lead down for ever. */
PART climb(Curves *curves, Py_ssize_t last, double least_run) {
    const Lanes shortest = (Lanes){0} + least_run;
    for (Py_ssize_t age = 0; age < last && age < AGES - 1; age++) {
        const Lanes used = curves->used[age], kept = curves->kept[age];
        Lanes most = (Lanes){0} - (double)INFINITY;
        for (Py_ssize_t end = age + 1; end <= last; end++) {
            Lanes run = curves->kept[end] - kept;
            keep_larger(&run, &shortest);
            const Lanes slope = (curves->used[end] - used) / run;
            keep_larger(&most, &slope);
        }
        curves->best[age] = most;
    }
}

/* Into `hazard` [ages] what share of the spells of a kind ends at every age. */
PART weigh(const Grid *level, const Grid *features, const Grid *factors, Py_ssize_t kind, double most_hazard, double *hazard) {
    memcpy(hazard, level->d, sizeof *hazard * AGES);
    multiply(features, factors, kind, hazard);
    for (int age = 0; age < AGES; age++) hazard[age] = hazard[age] < most_hazard ? hazard[age] : most_hazard;
    hazard[AGES - 1] = 0.0; /* nothing is known of what comes after */
}

WIDE PyObject *appraise(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Grids grids;
    Grid grid[6];
    bool failed = false;
    const char *method = "appraise(level, features, factors, widths, best, chance, last, most_hazard, least_run)";
    if (expect_arguments(method, given, 9)) return NULL;
    const int64_t last = number_of(arguments[6], &failed);
    const double most_hazard = real_of(arguments[7], &failed), least_run = real_of(arguments[8], &failed);
    if (failed || !grids_open(&grids, grid, arguments, "dqdddd")) return NULL;
    const Grid *level = &grid[0], *features = &grid[1], *factors = &grid[2], *widths = &grid[3];
    const Py_ssize_t kinds = features->rows;
    bool good = is_of(level, 1, AGES) && is_of(widths, 1, AGES) && factors->columns == AGES && are_below(features, factors->rows);
    good = good && is_of(&grid[4], kinds, AGES) && is_of(&grid[5], kinds, AGES) && last >= 0 && last <= AGES;
    for (Py_ssize_t first = 0; good && first < kinds; first += LANES) {
        const int lanes = kinds - first < LANES ? (int)(kinds - first) : LANES;
        Curves curves;
        memset(curves.hazard, 0, sizeof curves.hazard);
        for (int lane = 0; lane < lanes; lane++) {
            double hazard[AGES];
            weigh(level, features, factors, first + lane, most_hazard, hazard);
            for (int age = 0; age < AGES; age++) curves.hazard[age][lane] = hazard[age];
        }
        follow(&curves, widths->d);
        climb(&curves, last, least_run);
        for (int lane = 0; lane < lanes; lane++) {
            double *best = grid[4].d + (first + lane) * AGES, *chance = grid[5].d + (first + lane) * AGES;
            for (Py_ssize_t age = 0; age < last && age < AGES - 1; age++) best[age] = curves.best[age][lane];
            for (int age = 0; age < AGES; age++) chance[age] = curves.chance[age][lane];
        }
    }
    return done(&grids, good);
}
