package admission

var volume = []Field{
	{"name", Done, "volume", ""},
	{"hostPath", Done, "volume", ""},
	{"emptyDir", Done, "volume", ""},
	{"gcePersistentDisk", Refused, "", ""},
	{"awsElasticBlockStore", Refused, "", ""},
	{"gitRepo", Refused, "", ""},
	{"secret", Done, "volume", ""},
	{"nfs", Refused, "", ""},
	{"iscsi", Refused, "", ""},
	{"glusterfs", Refused, "", ""},
	{"persistentVolumeClaim", Done, "volume", "volumes of CSI drivers, local and hostPath, the node's own among them; with others pods wait, and say so: FailedMount"},
	{"rbd", Refused, "", ""},
	{"flexVolume", Refused, "", ""},
	{"cinder", Refused, "", ""},
	{"cephfs", Refused, "", ""},
	{"flocker", Refused, "", ""},
	{"downwardAPI", Done, "volume", ""},
	{"fc", Refused, "", ""},
	{"azureFile", Refused, "", ""},
	{"configMap", Done, "volume", ""},
	{"vsphereVolume", Refused, "", ""},
	{"quobyte", Refused, "", ""},
	{"azureDisk", Refused, "", ""},
	{"photonPersistentDisk", Refused, "", ""},
	{"projected", Done, "volume", ""},
	{"portworxVolume", Refused, "", ""},
	{"scaleIO", Refused, "", ""},
	{"storageos", Refused, "", ""},
	{"csi", Done, "volume", "by drivers that register at the agent"},
	{"ephemeral", Done, "volume", "as persistentVolumeClaim"},
	{"image", Done, "volume", "one for the life of the pod; containers can run programs in it: containerd 1.6 mounts none noexec"},
}

var csiSource = []Field{
	{"driver", Done, "csi", ""}, {"readOnly", Done, "csi", ""}, {"fsType", Done, "csi", ""}, {"volumeAttributes", Done, "csi", ""},
	{"nodePublishSecretRef", Done, "csi", ""},
}

var volumeDevice = []Field{{"name", Done, "pod", ""}, {"devicePath", Done, "pod", ""}}

var imageSource = []Field{{"reference", Done, "pod", ""}, {"pullPolicy", Done, "pod", ""}}

var claimSource = []Field{{"claimName", Done, "volume", ""}, {"readOnly", Done, "volume", ""}}

var ephemeralSource = []Field{{"volumeClaimTemplate", Meaningless, "", "the controllers make the claim of it"}}

var hostPathSource = []Field{{"path", Done, "volume", ""}, {"type", Done, "volume", ""}}

var emptyDirSource = []Field{
	{"medium", Partly, "volume", "Memory or the node's disk; others are refused"},
	{"sizeLimit", Done, "volume", ""},
	{"mode", Refused, "", ""},
}

var secretSource = []Field{
	{"secretName", Done, "volume", ""}, {"items", Done, "volume", ""}, {"defaultMode", Done, "volume", ""},
	{"optional", Done, "volume", ""}, {"defaultUser", Refused, "", ""},
}

var configMapSource = []Field{
	{"name", Done, "volume", ""}, {"items", Done, "volume", ""}, {"defaultMode", Done, "volume", ""},
	{"optional", Done, "volume", ""}, {"defaultUser", Refused, "", ""},
}

var keyToPath = []Field{{"key", Done, "volume", ""}, {"path", Done, "volume", ""}, {"mode", Done, "volume", ""}, {"user", Refused, "", ""}}

var downwardSource = []Field{{"items", Done, "volume", ""}, {"defaultMode", Done, "volume", ""}, {"defaultUser", Refused, "", ""}}

var downwardFile = []Field{
	{"path", Done, "volume", ""}, {"fieldRef", Done, "volume", ""}, {"resourceFieldRef", Done, "volume", ""},
	{"mode", Done, "volume", ""}, {"user", Refused, "", ""},
}

var projectedSource = []Field{{"sources", Done, "volume", ""}, {"defaultMode", Done, "volume", ""}, {"defaultUser", Refused, "", ""}}

var projection = []Field{
	{"secret", Done, "volume", ""}, {"downwardAPI", Done, "volume", ""}, {"configMap", Done, "volume", ""},
	{"serviceAccountToken", Done, "volume", ""}, {"clusterTrustBundle", Done, "volume", ""}, {"podCertificate", Done, "volume", ""},
}

var projectedItems = []Field{{"name", Done, "volume", ""}, {"items", Done, "volume", ""}, {"optional", Done, "volume", ""}}

var bundleProjection = []Field{
	{"name", Done, "volume", ""}, {"signerName", Done, "volume", ""}, {"labelSelector", Done, "volume", "none matches no bundle, an empty one all"},
	{"optional", Done, "volume", ""}, {"path", Done, "volume", ""}, {"user", Refused, "", ""},
}

var certificateProjection = []Field{
	{"signerName", Done, "volume", ""}, {"keyType", Done, "volume", ""}, {"maxExpirationSeconds", Done, "volume", ""},
	{"credentialBundlePath", Done, "volume", ""}, {"keyPath", Done, "volume", ""}, {"certificateChainPath", Done, "volume", ""},
	{"userAnnotations", Done, "volume", ""}, {"user", Refused, "", ""},
}

var tokenProjection = []Field{
	{"audience", Done, "volume", ""}, {"expirationSeconds", Done, "volume", ""}, {"path", Done, "volume", ""}, {"user", Refused, "", ""},
}
