package job

import (
	"errors"
	"fmt"
	"strings"
	"time"

	"github.com/robfig/cron/v3"
	batchv1 "k8s.io/api/batch/v1"
)

// afterSchedule is how long after a scheduled time a CronJob is looked at, so that a
// clock that is put back a little does not show a time before it.
const afterSchedule = 100 * time.Millisecond

// tooMany is how many missed times make one suspect that a clock is wrong.
const tooMany = 100

// parseSchedule reads a schedule as it is in the API: five fields, or "@hourly" and
// its like, in the CronJob's time zone unless the schedule names one itself. Without
// a zone it is in that of the times it is asked about, which here is UTC: the
// controllers' machines may each have a zone of their own.
func parseSchedule(cj *batchv1.CronJob) (schedule cron.Schedule, err error) {
	text := cj.Spec.Schedule
	if cj.Spec.TimeZone != nil && !namesZone(text) {
		text = fmt.Sprintf("TZ=%s %s", *cj.Spec.TimeZone, text)
	}
	defer func() { // the library panics on some strings that name a zone and nothing else
		if p := recover(); p != nil {
			schedule, err = nil, fmt.Errorf("invalid schedule format: %v", p)
		}
	}()
	return cron.ParseStandard(text)
}

// namesZone says whether a schedule names a time zone, which the API lets pass only
// in CronJobs from before it knew better.
func namesZone(schedule string) bool { return strings.Contains(schedule, "TZ") }

// zone is the time zone of a CronJob.
func zone(cj *batchv1.CronJob) (*time.Location, error) {
	if cj.Spec.TimeZone == nil {
		return time.UTC, nil
	}
	return time.LoadLocation(*cj.Spec.TimeZone)
}

// missed is what a schedule says since a Job was started last.
type missed struct {
	// since is where it was counted from, last the latest time that has come since, zero for none.
	since, last time.Time
	// count is roughly how many have come.
	count int64
}

var errNever = errors.New("time difference between two schedules is less than 1 second")

// missedTimes finds the latest time to start a Job at, since the last Job or the
// creation of the CronJob, and, if deadline is set, no longer ago than its starting deadline.
func missedTimes(cj *batchv1.CronJob, schedule cron.Schedule, now time.Time, deadline bool) (missed, error) {
	now = now.UTC()
	m := missed{since: cj.CreationTimestamp.UTC()}
	if t := cj.Status.LastScheduleTime; t != nil {
		m.since = t.UTC()
	}
	if d := cj.Spec.StartingDeadlineSeconds; deadline && d != nil {
		if earliest := now.Add(-time.Duration(*d) * time.Second); earliest.After(m.since) {
			m.since = earliest
		}
	}
	first := schedule.Next(m.since)
	second := schedule.Next(first)
	switch {
	case now.Before(first):
		return m, nil
	case now.Before(second):
		m.last, m.count = first, 1
		return m, nil
	}
	// "59 23 31 2 *" can be parsed but never comes.
	between := int64(second.Sub(first).Round(time.Second).Seconds())
	if between < 1 {
		return m, errNever
	}
	// The schedule may be years behind. It is not counted through: from the first
	// interval follows about how many times have come, and from two before the last
	// of them it is looked at closely. (Of "@every 7m" the start decides what comes.)
	m.count = int64(now.Sub(first).Seconds())/between + 1
	near := first.Add(time.Duration((m.count-2)*between) * time.Second)
	for t := schedule.Next(near); !t.After(now) && !t.IsZero(); t = schedule.Next(t) {
		m.last = t
	}
	return m, nil
}

// nextLook is when a CronJob is to be looked at if nothing changes before.
func nextLook(cj *batchv1.CronJob, schedule cron.Schedule, now time.Time) time.Time {
	m, err := missedTimes(cj, schedule, now, false)
	from := m.last
	switch {
	case err != nil:
		from = now.UTC()
	case !from.IsZero():
	case m.count == 0:
		from = m.since
	default:
		from = now.UTC()
	}
	next := schedule.Next(from)
	if next.IsZero() {
		return time.Time{}
	}
	return next.Add(afterSchedule)
}
