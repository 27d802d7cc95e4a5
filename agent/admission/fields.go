package admission

// Verdict is what a node does with a field.
type Verdict string

// What a node does with a field.
const (
	// Done: the node carries the field out.
	Done Verdict = "done"
	// Partly: some values are carried out, and pods with the others are refused.
	Partly Verdict = "partly"
	// Refused: a pod that has it is not run.
	Refused Verdict = "refused"
	// Meaningless: the field is for others: the scheduler, the API, another
	// operating system. Upstream's node does nothing with it either.
	Meaningless Verdict = "meaningless"
	// Missing: not done yet, and the pod runs without. Only what isolates
	// nothing and bounds nothing may be here.
	Missing Verdict = "missing"
)

// Field is one field of the types below v1.PodSpec.
type Field struct {
	// Name is the type and the field as in YAML: "PodSpec.hostUsers".
	Name    string
	Verdict Verdict
	// Where is the folder below agent/ whose source and tests carry the field
	// out, for Done and Partly.
	Where string
	// Note says what a person should know.
	Note string
}

// Fields returns the list. What is inside a field that is refused or
// meaningless is not listed.
func Fields() []Field {
	var out []Field
	for _, group := range []struct {
		typeName string
		fields   []Field
	}{
		{"PodSpec", podSpec}, {"PodSecurityContext", podSecurityContext}, {"Container", container}, {"EphemeralContainer", ephemeralContainer},
		{"SecurityContext", securityContext}, {"Capabilities", capabilities}, {"SeccompProfile", seccompProfile},
		{"AppArmorProfile", appArmorProfile}, {"SELinuxOptions", seLinuxOptions}, {"Sysctl", nameAndValue("pod")},
		{"ContainerResizePolicy", []Field{{"resourceName", Done, "pod", ""}, {"restartPolicy", Done, "pod", ""}}},
		{"ResourceRequirements", resourceRequirements}, {"ContainerPort", containerPort},
		{"ContainerRestartRule", restartRule}, {"ContainerRestartRuleOnExitCodes", restartRuleExitCodes},
		{"EnvVar", envVar}, {"EnvVarSource", envVarSource}, {"EnvFromSource", envFromSource},
		{"ConfigMapEnvSource", reference("pod")}, {"SecretEnvSource", reference("pod")},
		{"ConfigMapKeySelector", keySelector}, {"SecretKeySelector", keySelector},
		{"ObjectFieldSelector", objectField}, {"ResourceFieldSelector", resourceField},
		{"VolumeMount", volumeMount}, {"Probe", probe}, {"HTTPGetAction", httpGet}, {"HTTPHeader", nameAndValue("pod")},
		{"TCPSocketAction", tcpSocket}, {"GRPCAction", grpcAction}, {"ExecAction", []Field{{"command", Done, "pod", ""}}},
		{"Lifecycle", lifecycle}, {"LifecycleHandler", lifecycleHandler}, {"SleepAction", []Field{{"seconds", Done, "pod", ""}}},
		{"Volume", volume}, {"ImageVolumeSource", imageSource}, {"CSIVolumeSource", csiSource}, {"VolumeDevice", volumeDevice}, {"HostPathVolumeSource", hostPathSource},
		{"PersistentVolumeClaimVolumeSource", claimSource}, {"EphemeralVolumeSource", ephemeralSource}, {"EmptyDirVolumeSource", emptyDirSource},
		{"SecretVolumeSource", secretSource}, {"ConfigMapVolumeSource", configMapSource}, {"KeyToPath", keyToPath},
		{"DownwardAPIVolumeSource", downwardSource}, {"DownwardAPIVolumeFile", downwardFile},
		{"ProjectedVolumeSource", projectedSource}, {"VolumeProjection", projection},
		{"SecretProjection", projectedItems}, {"ConfigMapProjection", projectedItems},
		{"DownwardAPIProjection", []Field{{"items", Done, "volume", ""}}}, {"ServiceAccountTokenProjection", tokenProjection}, {"ClusterTrustBundleProjection", bundleProjection}, {"PodCertificateProjection", certificateProjection},
		{"LocalObjectReference", []Field{{"name", Done, "pod", ""}}},
		{"Affinity", affinityFields}, {"NodeAffinity", nodeAffinityFields}, {"NodeSelector", []Field{{"nodeSelectorTerms", Done, "admission", ""}}},
		{"NodeSelectorTerm", nodeSelectorTerm}, {"NodeSelectorRequirement", nodeSelectorRequirement},
		{"Toleration", toleration}, {"HostAlias", hostAlias}, {"PodDNSConfig", dnsConfig}, {"PodDNSConfigOption", nameAndValue("pod")},
		{"PodReadinessGate", []Field{{"conditionType", Done, "pod", ""}}}, {"PodOS", []Field{{"name", Partly, "admission", "only linux; others: PodOSNotSupported"}}},
	} {
		for _, f := range group.fields {
			f.Name = group.typeName + "." + f.Name
			out = append(out, f)
		}
	}
	return out
}

func nameAndValue(where string) []Field {
	return []Field{{"name", Done, where, ""}, {"value", Done, where, ""}}
}

func reference(where string) []Field {
	return []Field{{"name", Done, where, ""}, {"optional", Done, where, ""}}
}
