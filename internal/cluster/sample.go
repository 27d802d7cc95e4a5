package cluster

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"strings"
	"time"

	appsv1 "k8s.io/api/apps/v1"
	corev1 "k8s.io/api/core/v1"
	apierrors "k8s.io/apimachinery/pkg/api/errors"
	metav1 "k8s.io/apimachinery/pkg/apis/meta/v1"
	"k8s.io/apimachinery/pkg/util/intstr"
	"k8s.io/client-go/kubernetes"
)

const (
	sampleName  = "sample"
	sampleImage = "docker.io/timonel/sample:latest"
	samplePort  = 8080
)

// sample deploys the sample application and asks one of its pods.
func (u *up) sample(ctx context.Context) error {
	u.report.Start("sample application")
	begin := time.Now()
	ctx, cancel := context.WithTimeout(ctx, readyTimeout)
	defer cancel()
	why := "it cannot be deployed"
	err := poll(ctx, 100*time.Millisecond, func() (bool, error) {
		err := u.client.any(func(set *kubernetes.Clientset) error {
			_, err := set.AppsV1().Deployments(metav1.NamespaceDefault).Create(ctx, SampleDeployment(2), metav1.CreateOptions{})
			return err
		})
		if apierrors.IsInvalid(err) || apierrors.IsForbidden(err) {
			return false, err
		}
		if err != nil {
			why = err.Error()
		}
		return err == nil || apierrors.IsAlreadyExists(err), nil
	})
	var answer string
	if err == nil {
		err = poll(ctx, 50*time.Millisecond, func() (bool, error) {
			var err error
			if why, err = u.unavailable(ctx); err != nil {
				why = err.Error()
			}
			if why != "" {
				return false, nil
			}
			if answer, err = u.askPod(ctx); err != nil {
				why = err.Error()
			}
			return err == nil, nil
		})
	}
	if errors.Is(err, context.DeadlineExceeded) {
		return fmt.Errorf("the sample application is not available: %s: see `timonel kubectl describe pods`", why)
	} else if err != nil {
		return fmt.Errorf("deploy the sample application: %w", err)
	}
	u.report.Done("sample application available after %s; %s", seconds(time.Since(begin)), answer)
	return nil
}

// unavailable says why the sample application is not available, or "".
func (u *up) unavailable(ctx context.Context) (why string, err error) {
	err = u.client.any(func(set *kubernetes.Clientset) error {
		d, err := set.AppsV1().Deployments(metav1.NamespaceDefault).Get(ctx, sampleName, metav1.GetOptions{})
		if err != nil {
			return err
		}
		want := int32(1)
		if d.Spec.Replicas != nil {
			want = *d.Spec.Replicas
		}
		why = ""
		if d.Status.ObservedGeneration < d.Generation || d.Status.AvailableReplicas < want {
			why = fmt.Sprintf("%d of %d replicas are available", d.Status.AvailableReplicas, want)
		}
		return nil
	})
	return why, err
}

// askPod asks the sample application on the address of one of its pods.
func (u *up) askPod(ctx context.Context) (string, error) {
	var pods *corev1.PodList
	err := u.client.any(func(set *kubernetes.Clientset) (err error) {
		pods, err = set.CoreV1().Pods(metav1.NamespaceDefault).List(ctx, metav1.ListOptions{LabelSelector: "app=" + sampleName})
		return err
	})
	if err != nil {
		return "", err
	}
	for _, pod := range pods.Items {
		if pod.Status.PodIP == "" || pod.DeletionTimestamp != nil {
			continue
		}
		url := "http://" + net.JoinHostPort(pod.Status.PodIP, fmt.Sprint(samplePort)) + "/"
		ctx, cancel := context.WithTimeout(ctx, attempt)
		defer cancel()
		request, err := http.NewRequestWithContext(ctx, http.MethodGet, url, nil)
		if err != nil {
			return "", err
		}
		response, err := (&http.Client{Transport: &http.Transport{DisableKeepAlives: true}}).Do(request)
		if err != nil {
			return "", err
		}
		defer response.Body.Close()
		body, err := io.ReadAll(io.LimitReader(response.Body, 1024))
		return fmt.Sprintf("curl %s says: %s", url, strings.TrimSpace(string(body))), err
	}
	return "", errors.New("no pod of it has an address")
}

// SampleDeployment is the sample application.
func SampleDeployment(replicas int32) *appsv1.Deployment {
	labels := map[string]string{"app": sampleName}
	return &appsv1.Deployment{
		ObjectMeta: metav1.ObjectMeta{Name: sampleName, Namespace: metav1.NamespaceDefault, Labels: labels},
		Spec: appsv1.DeploymentSpec{
			Replicas: &replicas,
			Selector: &metav1.LabelSelector{MatchLabels: labels},
			Template: corev1.PodTemplateSpec{
				ObjectMeta: metav1.ObjectMeta{Labels: labels},
				Spec: corev1.PodSpec{Containers: []corev1.Container{{
					Name: sampleName, Image: sampleImage, ImagePullPolicy: corev1.PullIfNotPresent,
					Ports: []corev1.ContainerPort{{Name: "http", ContainerPort: samplePort}},
					Env: []corev1.EnvVar{{Name: "POD_NAME", ValueFrom: &corev1.EnvVarSource{
						FieldRef: &corev1.ObjectFieldSelector{FieldPath: "metadata.name"}}}},
					ReadinessProbe: &corev1.Probe{PeriodSeconds: 1, ProbeHandler: corev1.ProbeHandler{
						HTTPGet: &corev1.HTTPGetAction{Path: "/healthz", Port: intstr.FromString("http")}}},
				}}},
			},
		},
	}
}
