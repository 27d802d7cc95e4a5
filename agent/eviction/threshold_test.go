package eviction

import (
	"testing"

	"github.com/stretchr/testify/require"
	corev1 "k8s.io/api/core/v1"
	"k8s.io/apimachinery/pkg/api/resource"
)

func TestParseHard(t *testing.T) {
	t.Parallel()
	for _, tc := range []struct {
		text string
		want []string // signal and value where there are 1000Mi, in order
		err  string
	}{
		{"", nil, ""},
		{"none", nil, ""},
		{" none ", nil, ""},
		{DefaultHard, []string{"memory.available 100Mi", "nodefs.available 100Mi", "nodefs.inodesFree 50Mi", "imagefs.available 150Mi", "imagefs.inodesFree 50Mi", "pid.available 100Mi"}, ""},
		{DefaultShared, []string{"memory.available 100Mi", "pid.available 100Mi"}, ""},
		{"pid.available<5, memory.available < 1.5Gi", []string{"memory.available 1536Mi", "pid.available 5"}, ""},
		{"nodefs.available<0%,imagefs.available<100%,memory.available<1%", []string{"memory.available 10Mi"}, ""},
		{"nodefs.available<12.5%", []string{"nodefs.available 125Mi"}, ""},
		{"nodefs.available", nil, "is not SIGNAL<VALUE"},
		{"nodefs.available=10%", nil, "is not SIGNAL<VALUE"},
		{"nodefs.avail<10%", nil, `there is no signal "nodefs.avail"`},
		{"nodefs.available<10%,", nil, "is not SIGNAL<VALUE"},
		{"nodefs.available<10%,nodefs.available<5%", nil, "twice"},
		{"nodefs.available<0", nil, "more than 0"},
		{"nodefs.available<-1Gi", nil, "neither a quantity"},
		{"nodefs.available<-1%", nil, "is not a percent"},
		{"nodefs.available<101%", nil, "is not a percent"},
		{"nodefs.available<NaN%", nil, "is not a percent"},
		{"nodefs.available<", nil, "neither a quantity"},
		{"nodefs.available<10 %", nil, "is not a percent"},
	} {
		t.Run(tc.text, func(t *testing.T) {
			t.Parallel()
			list, err := ParseHard(tc.text)
			if tc.err != "" {
				require.ErrorContains(t, err, tc.err)
				return
			}
			require.NoError(t, err)
			var got []string
			for _, th := range list {
				got = append(got, string(th.Signal)+" "+th.Value.of(1000*mib).String())
			}
			require.Equal(t, tc.want, got)
		})
	}
}

func TestParseMinReclaim(t *testing.T) {
	t.Parallel()
	list, err := ParseHard("nodefs.available<10%,memory.available<100Mi")
	require.NoError(t, err)
	require.NoError(t, ParseMinReclaim("nodefs.available=5%,imagefs.available=1Gi", list), "one without a threshold says nothing")
	require.Nil(t, list[0].MinReclaim)
	require.Equal(t, "50Mi", list[1].MinReclaim.of(1000*mib).String())
	require.ErrorContains(t, ParseMinReclaim("nodefs.available<5%", list), "is not SIGNAL=VALUE")
}

func TestReserved(t *testing.T) {
	t.Parallel()
	list, err := ParseHard(DefaultHard)
	require.NoError(t, err)
	got := Reserved(list, corev1.ResourceList{corev1.ResourceMemory: resource.MustParse("4Gi"), corev1.ResourceEphemeralStorage: resource.MustParse("1000Mi")})
	require.Len(t, got, 2)
	memory, disk := got[corev1.ResourceMemory], got[corev1.ResourceEphemeralStorage]
	require.Equal(t, "100Mi", memory.String())
	require.Equal(t, "100Mi", disk.String())
}

func FuzzParseHard(f *testing.F) {
	for _, s := range []string{DefaultHard, DefaultShared, "none", "a<b", "pid.available<1e400", "memory.available<1E%", "nodefs.available<999999999999999999999Ei"} {
		f.Add(s)
	}
	f.Fuzz(func(t *testing.T, text string) {
		list, err := ParseHard(text)
		for _, th := range list {
			require.NoError(t, err)
			require.Positive(t, th.Value.of(1<<40).Sign())
			th.short(Observation{1, 1 << 40}, true)
		}
		_ = ParseMinReclaim(text, list)
	})
}
