package admission

var container = []Field{
	{"name", Done, "pod", ""},
	{"image", Done, "pod", ""},
	{"command", Done, "pod", ""},
	{"args", Done, "pod", ""},
	{"workingDir", Done, "pod", ""},
	{"ports", Done, "pod", ""},
	{"envFrom", Done, "pod", ""},
	{"env", Done, "pod", ""},
	{"resources", Done, "pod", ""},
	{"resizePolicy", Done, "pod", "RestartContainer in pods that restart Always; in others a resize is Infeasible"},
	{"restartPolicy", Done, "pod", ""},
	{"restartPolicyRules", Done, "pod", ""},
	{"volumeMounts", Done, "pod", ""},
	{"volumeDevices", Done, "pod", "block volumes of CSI drivers; pods with others wait, and say so: FailedMount"},
	{"livenessProbe", Done, "pod", ""},
	{"readinessProbe", Done, "pod", ""},
	{"startupProbe", Done, "pod", ""},
	{"lifecycle", Done, "pod", ""},
	{"terminationMessagePath", Done, "pod", ""},
	{"terminationMessagePolicy", Done, "pod", ""},
	{"imagePullPolicy", Done, "image", ""},
	{"securityContext", Done, "pod", ""},
	{"stdin", Done, "pod", ""},
	{"stdinOnce", Done, "pod", ""},
	{"tty", Done, "pod", ""},
}

// ephemeralContainer is what the API lets an ephemeral container have.
var ephemeralContainer = []Field{
	{"name", Done, "pod", ""},
	{"image", Done, "pod", ""},
	{"command", Done, "pod", ""},
	{"args", Done, "pod", ""},
	{"workingDir", Done, "pod", ""},
	{"ports", Meaningless, "", "the API allows none"},
	{"envFrom", Done, "pod", ""},
	{"env", Done, "pod", ""},
	{"resources", Meaningless, "", "the API allows none"},
	{"resizePolicy", Meaningless, "", "the API allows none"},
	{"restartPolicy", Meaningless, "", "the API allows none"},
	{"restartPolicyRules", Meaningless, "", "the API allows none"},
	{"volumeMounts", Done, "pod", ""},
	{"volumeDevices", Done, "pod", "block volumes of CSI drivers; pods with others wait, and say so: FailedMount"},
	{"livenessProbe", Meaningless, "", "the API allows none"},
	{"readinessProbe", Meaningless, "", "the API allows none"},
	{"startupProbe", Meaningless, "", "the API allows none"},
	{"lifecycle", Meaningless, "", "the API allows none"},
	{"terminationMessagePath", Done, "pod", ""},
	{"terminationMessagePolicy", Done, "pod", ""},
	{"imagePullPolicy", Done, "image", ""},
	{"securityContext", Done, "pod", ""},
	{"stdin", Done, "pod", ""},
	{"stdinOnce", Done, "pod", ""},
	{"tty", Done, "pod", ""},
	{"targetContainerName", Done, "pod", ""},
}

var securityContext = []Field{
	{"capabilities", Done, "pod", ""},
	{"privileged", Done, "pod", ""},
	{"seLinuxOptions", Partly, "pod", "refused where the kernel enforces SELinux; meaningless elsewhere, as upstream's"},
	{"windowsOptions", Refused, "", ""},
	{"runAsUser", Done, "pod", ""},
	{"runAsGroup", Done, "pod", ""},
	{"runAsNonRoot", Done, "pod", ""},
	{"readOnlyRootFilesystem", Done, "pod", ""},
	{"allowPrivilegeEscalation", Done, "pod", ""},
	{"procMount", Partly, "pod", "Unmasked is for pods with hostUsers: false, and refused in others"},
	{"seccompProfile", Done, "pod", ""},
	{"appArmorProfile", Partly, "pod", "where the kernel has AppArmor; else refused: AppArmor"},
}

var capabilities = []Field{{"add", Done, "pod", ""}, {"drop", Done, "pod", ""}}

var seccompProfile = []Field{{"type", Done, "pod", ""}, {"localhostProfile", Done, "pod", "a file below seccomp/ in the agent's data folder"}}

var appArmorProfile = []Field{{"type", Done, "pod", ""}, {"localhostProfile", Done, "pod", ""}}

var seLinuxOptions = []Field{{"user", Done, "pod", ""}, {"role", Done, "pod", ""}, {"type", Done, "pod", ""}, {"level", Done, "pod", ""}}

var resourceRequirements = []Field{
	{"limits", Done, "pod", "cpu, memory; huge pages are refused: OutOfhugepages-SIZE"},
	{"requests", Done, "pod", "held against what the node has when the pod is accepted: OutOfcpu and so on"},
	{"claims", Refused, "", "dynamic resource allocation"},
}

var containerPort = []Field{
	{"name", Done, "pod", ""}, {"hostPort", Done, "pod", "a conflict is refused: NodePorts"}, {"containerPort", Done, "pod", ""},
	{"protocol", Done, "pod", ""}, {"hostIP", Done, "pod", ""},
}

var restartRule = []Field{
	{"action", Partly, "pod", "Restart and RestartAllContainers; a pod that restarts all again and again waits between, as containers that fail do"},
	{"exitCodes", Done, "pod", ""},
}

var restartRuleExitCodes = []Field{{"operator", Done, "pod", ""}, {"values", Done, "pod", ""}}

var envVar = []Field{{"name", Done, "pod", ""}, {"value", Done, "pod", ""}, {"valueFrom", Done, "pod", ""}}

var envVarSource = []Field{
	{"fieldRef", Done, "pod", ""}, {"resourceFieldRef", Done, "pod", ""}, {"configMapKeyRef", Done, "pod", ""},
	{"secretKeyRef", Done, "pod", ""}, {"fileKeyRef", Refused, "", ""},
}

var envFromSource = []Field{{"prefix", Done, "pod", ""}, {"configMapRef", Done, "pod", ""}, {"secretRef", Done, "pod", ""}}

var keySelector = []Field{{"name", Done, "pod", ""}, {"key", Done, "pod", ""}, {"optional", Done, "pod", ""}}

var objectField = []Field{
	{"apiVersion", Meaningless, "", "there is one version of the fields"},
	{"fieldPath", Done, "pod", ""},
}

var resourceField = []Field{{"containerName", Done, "pod", ""}, {"resource", Done, "pod", ""}, {"divisor", Done, "pod", ""}}

var volumeMount = []Field{
	{"name", Done, "pod", ""},
	{"readOnly", Done, "pod", ""},
	{"recursiveReadOnly", Done, "pod", "the agent does it, not the runtime; before Linux 5.12 Enabled is refused and IfPossible is not possible"},
	{"mountPath", Done, "pod", ""},
	{"subPath", Done, "pod", "a pod that needs more than 1,024 mounts of the node, its volumes included, is refused"},
	{"mountPropagation", Done, "pod", ""},
	{"subPathExpr", Done, "pod", ""},
	{"bindMountOptions", Refused, "", ""},
}

var probe = []Field{
	{"exec", Done, "pod", ""}, {"httpGet", Done, "pod", ""}, {"tcpSocket", Done, "pod", ""}, {"grpc", Done, "pod", ""},
	{"initialDelaySeconds", Done, "pod", ""}, {"timeoutSeconds", Done, "pod", ""}, {"periodSeconds", Done, "pod", ""},
	{"successThreshold", Done, "pod", ""}, {"failureThreshold", Done, "pod", ""}, {"terminationGracePeriodSeconds", Done, "pod", ""},
}

var httpGet = []Field{
	{"path", Done, "pod", ""}, {"port", Done, "pod", ""}, {"host", Done, "pod", ""}, {"scheme", Done, "pod", ""},
	{"httpHeaders", Done, "pod", ""}, {"protocol", Partly, "admission", "HTTP1; HTTP2 is refused"},
}

var tcpSocket = []Field{{"port", Done, "pod", ""}, {"host", Done, "pod", ""}}

var grpcAction = []Field{{"port", Done, "pod", ""}, {"service", Done, "pod", ""}, {"mode", Partly, "admission", "Plaintext; TLS is refused"}}

var lifecycle = []Field{
	{"postStart", Done, "pod", ""}, {"preStop", Done, "pod", ""},
	{"stopSignal", Refused, "", "containerd 1.6 takes the image's"},
}

var lifecycleHandler = []Field{
	{"exec", Done, "pod", ""}, {"httpGet", Done, "pod", ""},
	{"tcpSocket", Done, "pod", ""}, {"sleep", Done, "pod", ""},
}
