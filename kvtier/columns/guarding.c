/* The counts of every call: what LRU would have found (`kvtier.policy.guard`), and when the next cohort begins (`kvtier.policy.reuse`). */
#include "spells.h"

static bool are_counted(const int64_t *numbers, int count, int64_t least) {
    bool counted = true;
    for (int i = 0; i < count; i++) counted &= numbers[i] >= least && numbers[i] <= MOST_COUNTED;
    return counted;
}

bool is_in_order(const Spells *s) {
    const bool signed_too = are_counted(s->guard, GUARD_CELLS, -MOST_COUNTED), others = are_counted(s->period, PERIOD_CELLS, 0);
    return signed_too && others && are_counted(s->counts, COUNT_CELLS, 0) && s->guard[FIRST] >= 0 && s->guard[ROOM] >= 0;
}

bool was_held(Spells *s, int64_t call) {
    if (call < 0 || call < s->guard[FIRST]) return false;
    s->ring[call & (s->calls - 1)]--;
    s->guard[HELD]--;
    return true;
}

void count_held(Spells *s, Py_ssize_t pages, int64_t call) {
    int64_t *guard = s->guard;
    s->ring[call & (s->calls - 1)] += pages;
    guard[HELD] += pages;
    for (; guard[FIRST] < call && (guard[HELD] > guard[ROOM] || call - guard[FIRST] >= s->calls - 1); guard[FIRST]++) {
        guard[HELD] -= s->ring[guard[FIRST] & (s->calls - 1)];
        s->ring[guard[FIRST] & (s->calls - 1)] = 0;
    }
}

/* `Guard.settle`: whether it is the other order's turn now. */
static bool settle_debt(Spells *s, int64_t uses) {
    int64_t *guard = s->guard;
    const int64_t owed = guard[OWED] - guard[SETTLED], room = guard[ROOM];
    guard[SETTLED] = guard[OWED];
    if (guard[FOLLOWS]) {
        guard[LEFT] -= uses;
        if (guard[LEFT] > 0) return false;
        guard[FOLLOWS] = guard[DEBT] = guard[GAIN] = 0;
        return true;
    }
    guard[DEBT] = guard[DEBT] + owed > 0 ? guard[DEBT] + owed : 0;
    guard[GAIN] -= owed;
    if (guard[GAIN] > 2 * room) guard[GAIN] = guard[DOUBLINGS] = 0;
    if (guard[DEBT] <= room) return false;
    guard[FOLLOWS] = 1;
    guard[FALLS]++;
    guard[LEFT] = (int64_t)((uint64_t)s->steps[BASE_USES] * (uint64_t)room << (guard[DOUBLINGS] & 63));
    if (guard[DOUBLINGS] < s->steps[MOST_DOUBLINGS]) guard[DOUBLINGS]++;
    return true;
}

/* `ReuseModel.count`: whether a cohort has had its spells and calls. */
static bool is_full(Spells *s, int64_t spells) {
    int64_t *period = s->period;
    period[BEGUN] += spells;
    period[CALLS]++;
    return !period[STARTED] || (period[BEGUN] >= period[SPELLS_DUE] && period[CALLS] >= period[CALLS_DUE]);
}

long end_call(Spells *s, int64_t spells) {
    s->counts[CALL_NUMBER]++;
    const bool full = is_full(s, spells), changed = settle_debt(s, spells);
    return full * COHORT_DUE + changed * ORDER_CHANGED;
}
