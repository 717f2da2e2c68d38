/* What pages of a kind are worth at every age: `kvtier.policy.hazards` `_appraise`, to the same bits. Of as many kinds at a time as there
   are lanes, one in each. */
#include "grids.h"
#include "spells.h"

enum { LANES = 4, BETWEEN_LOOKS = 4 };

/* One number of each of these kinds, and its bits or what a comparison of two says of each. Never handed over by value: where there are no
   registers as wide, that has no agreed way. */
typedef double Lanes __attribute__((vector_size(sizeof(double) * LANES)));
typedef uint64_t Bits __attribute__((vector_size(sizeof(uint64_t) * LANES)));

typedef struct {
    Lanes hazard[AGES], survival[AGES + 1], used[AGES + 1], kept[AGES + 1], worth[AGES], chance[AGES];
} Curves;

/* Into `most` the larger of each pair. */
PART keep_larger(Lanes *most, const Lanes *others) {
    const Bits first = (Bits)(*most > *others);
    *most = (Lanes)((first & (Bits)*most) | (~first & (Bits)*others));
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

/* The steepest of the ways from every age below `last` to a later one, up to `last`, after which all lead down for ever. No way to a later
   end is steeper than one that wins, by this end, all that there is to win: once that is less than was found, look no further. */
PART climb(Curves *curves, Py_ssize_t last, double least_run) {
    const Lanes shortest = (Lanes){0} + least_run;
    for (Py_ssize_t age = 0; age < last; age++) {
        const Lanes used = curves->used[age], kept = curves->kept[age], all = curves->used[last] - used;
        Lanes most = (Lanes){0} - (double)INFINITY;
        for (Py_ssize_t end = age + 1; end <= last; end++) {
            Lanes run = curves->kept[end] - kept;
            keep_larger(&run, &shortest);
            const Lanes slope = (curves->used[end] - used) / run;
            keep_larger(&most, &slope);
            if (end % BETWEEN_LOOKS) continue;
            const Bits less = (Bits)(all < most * run);
            if (less[0] & less[1] & less[2] & less[3]) break;
        }
        curves->worth[age] = most;
    }
}

/* `kvtier.policy.hazards` `_log`. */
PART take_log(Lanes *numbers) {
    const uint64_t one = 0x3FF0000000000000, root_of_half = 0x3FE6A09E667F3BCD, two_to_52 = 0x4330000000000000;
    const Bits bits = (Bits)*numbers, power = (bits + (one - root_of_half)) >> 52;
    const Lanes rest = (Lanes)(bits - ((power - 1023) << 52)), powers = (Lanes)(power | two_to_52) - (0x1p52 + 1023);
    const Lanes part = (rest - 1.0) / (rest + 1.0), square = part * part;
    Lanes series = (Lanes){0};
    for (int term = 9; term >= 0; term--) series = series * square + 2.0 / (2 * term + 1);
    *numbers = powers * 0.6931471805599453 + part * series;
}

/* The logarithms of uses per second, at least that of `least_density`; that from `last` on, where nobody is used any more. */
PART tell(Curves *curves, Py_ssize_t last, double least_density) {
    const Lanes least = (Lanes){0} + least_density;
    Lanes nothing = least;
    take_log(&nothing);
    for (Py_ssize_t age = 0; age < last; age++) {
        Lanes worth = curves->worth[age];
        keep_larger(&worth, &least);
        take_log(&worth);
        curves->worth[age] = worth;
    }
    for (Py_ssize_t age = last; age < AGES; age++) curves->worth[age] = nothing;
}

/* What share of the spells of a kind, in this lane, ends at every age. */
PART weigh(Curves *curves, int lane, const Grid *level, const Grid *factors, const int64_t *features, Py_ssize_t count, double most) {
    const double *first = factors->d + features[0] * AGES;
    double hazard[AGES];
    for (int age = 0; age < AGES; age++) hazard[age] = level->d[age] * first[age];
    for (Py_ssize_t feature = 1; feature < count; feature++) {
        const double *factor = factors->d + features[feature] * AGES;
        for (int age = 0; age < AGES; age++) hazard[age] *= factor[age];
    }
    for (int age = 0; age < AGES; age++) curves->hazard[age][lane] = hazard[age] < most ? hazard[age] : most;
    curves->hazard[AGES - 1][lane] = 0.0; /* nothing is known of what comes after */
}

WIDE PyObject *appraise(PyObject *self, PyObject *const *arguments, Py_ssize_t given) {
    (void)self;
    Grids grids;
    Grid grid[6];
    bool failed = false;
    const char *method = "appraise(level, features, factors, widths, worth, chance, last, most_hazard, least_run, least_density)";
    if (expect_arguments(method, given, 10)) return NULL;
    const int64_t last = number_of(arguments[6], &failed);
    const double most_hazard = real_of(arguments[7], &failed), least_run = real_of(arguments[8], &failed);
    const double least_density = real_of(arguments[9], &failed);
    if (failed || !grids_open(&grids, grid, arguments, "dqdddd")) return NULL;
    const Grid *level = &grid[0], *features = &grid[1], *factors = &grid[2], *widths = &grid[3];
    const Py_ssize_t kinds = features->rows;
    bool good = is_of(level, 1, AGES) && features->columns > 0 && is_of(widths, 1, AGES) && factors->columns == AGES;
    good = good && are_below(features, factors->rows) && is_of(&grid[4], kinds, AGES) && is_of(&grid[5], kinds, AGES);
    good = good && last >= 0 && last < AGES;
    for (Py_ssize_t first = 0; good && first < kinds; first += LANES) {
        const int lanes = kinds - first < LANES ? (int)(kinds - first) : LANES;
        Curves curves;
        for (int lane = 0; lane < LANES; lane++) {
            const Py_ssize_t kind = lane < lanes ? first + lane : first;
            weigh(&curves, lane, level, factors, features->q + kind * features->columns, features->columns, most_hazard);
        }
        follow(&curves, widths->d);
        climb(&curves, last, least_run);
        tell(&curves, last, least_density);
        for (int lane = 0; lane < lanes; lane++) {
            double *worth = grid[4].d + (first + lane) * AGES, *chance = grid[5].d + (first + lane) * AGES;
            for (int age = 0; age < AGES; age++) worth[age] = curves.worth[age][lane];
            for (int age = 0; age < AGES; age++) chance[age] = curves.chance[age][lane];
        }
    }
    return grids_done(&grids, good);
}
