/* What is counted and learned of kinds of pages at all ages: `kvtier.policy.reuse` `_expose`, `kvtier.policy.hazards` `_learn`. Sums are
   taken in the order in which NumPy takes them: the numbers are the same to the last bit. */
#include "grids.h"
#include "spells.h"

#include <string.h>

/* -- exposure -- */

/* The living spells of a cohort [kinds] have been exposed at the ages from `start` on, up to below `until`. */
static void reach(const int64_t *alive, int64_t *change, Py_ssize_t kinds, int64_t start, int64_t until) {
    for (Py_ssize_t kind = 0; kind < kinds; kind++) {
        if (!alive[kind]) continue; /* most of them: what follows is far apart in memory */
        change[kind * (AGES + 1) + start] += alive[kind];
        change[kind * (AGES + 1) + until] -= alive[kind];
    }
}

/* The age that the spells of a cohort have on average. */
static int age_of(const Grid *began, Py_ssize_t cohort, double end, double now) {
    const double age = now - (began->d[cohort] + end) / 2;
    return age_bin(age > 0.0 ? age : 0.0);
}

WIDE PyObject *expose(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Grids grids;
    Grid grid[7];
    bool failed = false;
    const char *method = "expose(began, counted, alive, change, hits, all_exposed, all_hits, cohort, now)";
    if (expect_arguments(method, given, 9)) return NULL;
    const int64_t cohort = number_of(arguments[7], &failed);
    const double now = real_of(arguments[8], &failed);
    if (failed || !grids_open(&grids, grid, arguments, "dqqqqdd")) return NULL;
    const Grid *began = &grid[0], *counted = &grid[1], *alive = &grid[2];
    int64_t *change = grid[3].q, *hits = grid[4].q;
    double *all_exposed = grid[5].d, *all_hits = grid[6].d;
    const Py_ssize_t kinds = grid[3].rows, cohorts = began->columns; /* `alive` has room for more */
    bool good = is_of(began, 1, cohorts) && cohorts && is_of(counted, 1, cohorts) && alive->rows == cohorts && kinds <= alive->columns;
    good = good && grid[3].columns == AGES + 1 && is_of(&grid[4], kinds, AGES) && is_of(&grid[5], kinds, AGES);
    good = good && is_of(&grid[6], kinds, AGES) && cohort >= 0 && cohort <= MOST_COUNTED;
    int64_t one = cohort > cohorts ? cohort - cohorts : 0;
    for (Py_ssize_t row = good ? (Py_ssize_t)(one % cohorts) : 0, next; good && one < cohort; one++, row = next) {
        next = row + 1 < cohorts ? row + 1 : 0;
        const int64_t start = counted->q[row], until = age_of(began, row, one + 1 < cohort ? began->d[next] : now, now) + 1;
        if (start < 0 || until <= start) continue;
        reach(alive->q + row * alive->columns, change, kinds, start, until);
        counted->q[row] = until;
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
    return grids_done(&grids, good);
}

/* -- factors: `features` [kinds, features] has, for every kind and feature, a row of `factors` [values, ages] -- */

/* What a fit goes by. */
typedef struct {
    Grid hits, exposed, expected, features, firsts, factors, smoothing, level, seen, due;
    double fade, prior, least_exposure, least_hazard, most_hazard;
} Fit;

static double *row_of(const Grid *grid, Py_ssize_t row) { return grid->d + row * AGES; }

/* The row of a kind's value of a feature in all grids by value. */
static Py_ssize_t value_of(const Fit *fit, Py_ssize_t kind, Py_ssize_t feature) {
    return (Py_ssize_t)fit->features.q[kind * fit->features.columns + feature];
}

PART add(double *restrict sums, const double *restrict row) {
    for (int age = 0; age < AGES; age++) sums[age] += row[age];
}

PART multiply(double *restrict product, const double *restrict row, const double *restrict by) {
    for (int age = 0; age < AGES; age++) product[age] = row[age] * by[age];
}

PART scale(double *restrict row, const double *restrict by) {
    for (int age = 0; age < AGES; age++) row[age] *= by[age];
}

PART fade(double *row, double left) {
    for (int age = 0; age < AGES; age++) row[age] *= left;
}

/* Into `smooth` [ages] counts [ages] with those of neighbouring ages, the nearest first, by `smoothing` [distances]. */
PART spread(const Grid *smoothing, const double *counts, double *smooth) {
    double wide[3 * AGES] = {0}, *const middle = wide + AGES;
    memcpy(middle, counts, sizeof *counts * AGES);
    for (int age = 0; age < AGES; age++) smooth[age] = smoothing->d[0] * middle[age];
    for (Py_ssize_t apart = 1; apart < smoothing->columns; apart++) {
        const double weight = smoothing->d[apart], *younger = middle - apart, *older = middle + apart;
        for (int age = 0; age < AGES; age++) smooth[age] = smooth[age] + weight * younger[age] + weight * older[age];
    }
}

/* Adds up hits by age, by age and value of every feature, and exposure by age; of hits, what counts at the next fit is left. */
PART add_up(const Fit *fit, double *hits, double *exposed) {
    for (Py_ssize_t kind = 0; kind < fit->hits.rows; kind++) {
        double *of_kind = row_of(&fit->hits, kind);
        add(hits, of_kind);
        add(exposed, row_of(&fit->exposed, kind));
        for (Py_ssize_t feature = 0; feature < fit->features.columns; feature++) {
            add(row_of(&fit->seen, value_of(fit, kind, feature)), of_kind);
        }
        fade(of_kind, fit->fade);
    }
}

/* Of the spells that get so old, over all kinds, the share that ends. */
PART find_level(const Fit *fit, const double *hits, const double *exposed) {
    double used[AGES], kept[AGES];
    spread(&fit->smoothing, hits, used);
    spread(&fit->smoothing, exposed, kept);
    for (int age = 0; age < AGES; age++) {
        const double level = used[age] / (kept[age] + fit->least_exposure);
        const double most = level < fit->most_hazard ? level : fit->most_hazard;
        fit->level.d[age] = most > fit->least_hazard ? most : fit->least_hazard;
    }
}

/* What is expected of every kind by the factors of the last fit, and added up by value of the first feature. */
PART expect(const Fit *fit) {
    for (Py_ssize_t kind = 0; kind < fit->hits.rows; kind++) {
        double *exposed = row_of(&fit->exposed, kind), *expected = row_of(&fit->expected, kind);
        multiply(expected, exposed, fit->level.d);
        for (Py_ssize_t feature = 0; feature < fit->features.columns; feature++) {
            scale(expected, row_of(&fit->factors, value_of(fit, kind, feature)));
        }
        add(row_of(&fit->due, value_of(fit, kind, 0)), expected);
        fade(exposed, fit->fade);
    }
}

/* The factors of this feature's values anew; what they are to those of before goes where was due what was expected. */
PART refit(const Fit *fit, Py_ssize_t feature) {
    for (Py_ssize_t value = fit->firsts.q[feature]; value < fit->firsts.q[feature + 1]; value++) {
        double *factor = row_of(&fit->factors, value), *due = row_of(&fit->due, value), but_for[AGES], used[AGES], kept[AGES];
        for (int age = 0; age < AGES; age++) but_for[age] = due[age] / factor[age];
        spread(&fit->smoothing, row_of(&fit->seen, value), used);
        spread(&fit->smoothing, but_for, kept);
        for (int age = 0; age < AGES; age++) {
            const double after = (used[age] + fit->prior) / (kept[age] + fit->prior);
            due[age] = after / factor[age];
            factor[age] = after;
        }
    }
}

/* What is expected after all, now that the factors of a feature are others, and added up by value of the next feature. */
PART expect_anew(const Fit *fit, Py_ssize_t feature) {
    for (Py_ssize_t kind = 0; kind < fit->hits.rows; kind++) {
        double *expected = row_of(&fit->expected, kind);
        scale(expected, row_of(&fit->due, value_of(fit, kind, feature)));
        add(row_of(&fit->due, value_of(fit, kind, feature + 1)), expected);
    }
}

static bool fits(const Fit *fit) {
    const Py_ssize_t kinds = fit->hits.rows, features = fit->features.columns, values = fit->factors.rows;
    const Grid *by_kind[] = {&fit->hits, &fit->exposed, &fit->expected}, *by_value[] = {&fit->factors, &fit->seen, &fit->due};
    bool good = is_of(&fit->features, kinds, features) && features && is_of(&fit->firsts, 1, features + 1) && is_of(&fit->level, 1, AGES);
    for (int i = 0; i < 3; i++) good = good && is_of(by_kind[i], kinds, AGES) && is_of(by_value[i], values, AGES);
    good = good && fit->smoothing.rows == 1 && fit->smoothing.columns > 0 && fit->smoothing.columns <= AGES;
    return good && are_below(&fit->features, values) && are_below(&fit->firsts, values + 1);
}

PART learn_from(const Fit *fit) {
    double hits[AGES] = {0}, exposed[AGES] = {0};
    memset(fit->seen.d, 0, sizeof(double) * (size_t)(fit->seen.rows * AGES));
    memset(fit->due.d, 0, sizeof(double) * (size_t)(fit->due.rows * AGES));
    add_up(fit, hits, exposed);
    find_level(fit, hits, exposed);
    expect(fit);
    for (Py_ssize_t feature = 0; feature < fit->features.columns; feature++) {
        refit(fit, feature);
        if (feature + 1 < fit->features.columns) expect_anew(fit, feature);
    }
}

WIDE PyObject *learn(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Grids grids;
    Grid grid[10];
    bool failed = false;
    const char *method = "learn(hits, exposed, expected, features, firsts, factors, smoothing, level, seen, due, fade, prior, "
                         "least_exposure, least_hazard, most_hazard)";
    if (expect_arguments(method, given, 15)) return NULL;
    double numbers[5];
    for (int i = 0; i < 5; i++) numbers[i] = real_of(arguments[10 + i], &failed);
    if (failed || !grids_open(&grids, grid, arguments, "dddqqddddd")) return NULL;
    const Fit fit = {grid[0], grid[1], grid[2], grid[3], grid[4], grid[5], grid[6], grid[7], grid[8], grid[9],
                     numbers[0], numbers[1], numbers[2], numbers[3], numbers[4]};
    const bool good = fits(&fit);
    if (good) learn_from(&fit);
    return grids_done(&grids, good);
}
