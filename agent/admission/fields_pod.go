package admission

var podSpec = []Field{
	{"volumes", Done, "volume", ""},
	{"initContainers", Done, "pod", "sidecars included"},
	{"containers", Done, "pod", ""},
	{"ephemeralContainers", Done, "pod", "one with a field that is refused is not started and the pod goes on: its status says terminated, PodFeatureUnsupported, and so does an event"},
	{"restartPolicy", Done, "pod", ""},
	{"terminationGracePeriodSeconds", Done, "pod", ""},
	{"activeDeadlineSeconds", Done, "pod", ""},
	{"dnsPolicy", Done, "pod", ""},
	{"nodeSelector", Done, "admission", "when the pod is accepted: NodeAffinity"},
	{"serviceAccountName", Done, "pod", ""},
	{"serviceAccount", Meaningless, "", "the old name of serviceAccountName"},
	{"automountServiceAccountToken", Meaningless, "", "the API adds the volume"},
	{"nodeName", Done, "admission", ""},
	{"hostNetwork", Done, "pod", ""},
	{"hostPID", Done, "pod", ""},
	{"hostIPC", Done, "pod", ""},
	{"shareProcessNamespace", Done, "pod", ""},
	{"securityContext", Done, "pod", ""},
	{"imagePullSecrets", Done, "pod", ""},
	{"hostname", Done, "pod", ""},
	{"subdomain", Done, "pod", ""},
	{"affinity", Done, "admission", ""},
	{"schedulerName", Meaningless, "", "for the scheduler"},
	{"tolerations", Done, "admission", ""},
	{"hostAliases", Done, "pod", ""},
	{"priorityClassName", Done, "pod", "system-node-critical is killed last for want of memory; a critical pod does not make room for itself on the node as the kubelet does"},
	{"priority", Meaningless, "", "for the scheduler"},
	{"dnsConfig", Done, "pod", ""},
	{"readinessGates", Done, "pod", ""},
	{"runtimeClassName", Done, "pod", "handlers are containerd's: runc, and those of the agent's --runtime-handler; a pod with another waits: FailedCreatePodSandBox"},
	{"enableServiceLinks", Done, "pod", ""},
	{"preemptionPolicy", Meaningless, "", "for the scheduler"},
	{"overhead", Done, "pod", "in the pod's cgroup and in what the node has; the runtime is told of it"},
	{"topologySpreadConstraints", Meaningless, "", "for the scheduler"},
	{"setHostnameAsFQDN", Done, "pod", ""},
	{"os", Partly, "admission", ""},
	{"hostUsers", Partly, "pod", "false needs containerd 2.0, runc 1.2 and Linux 6.3, and is refused without; image volumes are not mapped: their files are nobody's, and can be read as others may"},
	{"schedulingGates", Meaningless, "", "a pod that is bound has none"},
	{"resourceClaims", Refused, "", "dynamic resource allocation"},
	{"resources", Done, "pod", "in the pod's cgroup"},
	{"hostnameOverride", Done, "pod", ""},
	{"schedulingGroup", Meaningless, "", "for the scheduler"},
	{"evictionResponders", Meaningless, "", "for controllers"},
}

var podSecurityContext = []Field{
	{"seLinuxOptions", Partly, "pod", "refused where the kernel enforces SELinux; meaningless elsewhere, as upstream's"},
	{"windowsOptions", Refused, "", ""},
	{"runAsUser", Done, "pod", ""},
	{"runAsGroup", Done, "pod", ""},
	{"runAsNonRoot", Done, "pod", ""},
	{"supplementalGroups", Done, "pod", ""},
	{"supplementalGroupsPolicy", Partly, "pod", "Strict needs containerd 2.0, and is refused without: SupplementalGroupsPolicyNotSupported"},
	{"fsGroup", Done, "volume", ""},
	{"sysctls", Partly, "pod", "the safe ones and those of the agent's --allowed-unsafe-sysctls; others: SysctlForbidden"},
	{"fsGroupChangePolicy", Meaningless, "", "it is about volumes that outlive their pods"},
	{"seccompProfile", Done, "pod", ""},
	{"appArmorProfile", Partly, "pod", "where the kernel has AppArmor; else refused: AppArmor"},
	{"seLinuxChangePolicy", Meaningless, "", "it is about volumes that outlive their pods"},
}

var affinityFields = []Field{
	{"nodeAffinity", Done, "admission", ""},
	{"podAffinity", Meaningless, "", "for the scheduler"},
	{"podAntiAffinity", Meaningless, "", "for the scheduler"},
}

var nodeAffinityFields = []Field{
	{"requiredDuringSchedulingIgnoredDuringExecution", Done, "admission", "when the pod is accepted: NodeAffinity"},
	{"preferredDuringSchedulingIgnoredDuringExecution", Meaningless, "", "for the scheduler"},
}

var nodeSelectorTerm = []Field{{"matchExpressions", Done, "admission", ""}, {"matchFields", Done, "admission", ""}}

var nodeSelectorRequirement = []Field{{"key", Done, "admission", ""}, {"operator", Done, "admission", ""}, {"values", Done, "admission", ""}}

var toleration = []Field{
	{"key", Done, "admission", "of NoExecute taints, when the pod is accepted"},
	{"operator", Done, "admission", ""},
	{"value", Done, "admission", ""},
	{"effect", Done, "admission", ""},
	{"tolerationSeconds", Meaningless, "", "for the node lifecycle controller"},
}

var hostAlias = []Field{{"ip", Done, "pod", ""}, {"hostnames", Done, "pod", ""}}

var dnsConfig = []Field{{"nameservers", Done, "pod", ""}, {"searches", Done, "pod", ""}, {"options", Done, "pod", ""}}
