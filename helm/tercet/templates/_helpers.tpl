{{/* Base name of every resource. */}}
{{- define "tercet.fullname" -}}
{{- if .Values.fullnameOverride -}}
{{- .Values.fullnameOverride | trunc 50 | trimSuffix "-" -}}
{{- else -}}
{{- $name := default .Chart.Name .Values.nameOverride -}}
{{- ternary .Release.Name (printf "%s-%s" .Release.Name $name) (contains $name .Release.Name) | trunc 50 | trimSuffix "-" -}}
{{- end -}}
{{- end -}}

{{/* Labels that never change during the life of a release; takes a dict of root and component. */}}
{{- define "tercet.selectorLabels" -}}
app.kubernetes.io/name: {{ default .root.Chart.Name .root.Values.nameOverride }}
app.kubernetes.io/instance: {{ .root.Release.Name }}
app.kubernetes.io/component: {{ .component }}
{{- end -}}

{{/* All labels; takes a dict of root and component. */}}
{{- define "tercet.labels" -}}
{{ include "tercet.selectorLabels" . }}
app.kubernetes.io/version: {{ .root.Chart.AppVersion | quote }}
app.kubernetes.io/managed-by: {{ .root.Release.Service }}
helm.sh/chart: {{ printf "%s-%s" .root.Chart.Name .root.Chart.Version }}
{{- end -}}

{{- define "tercet.image" -}}
{{ .Values.image.repository }}:{{ default .Chart.AppVersion .Values.image.tag }}
{{- end -}}

{{- define "tercet.serviceAccountName" -}}
{{- default (ternary (include "tercet.fullname" .) "default" .Values.serviceAccount.create) .Values.serviceAccount.name -}}
{{- end -}}

{{/* The etcd endpoints as one comma-separated value. */}}
{{- define "tercet.etcd" -}}
{{- if and .Values.etcd.bundled .Values.etcd.endpoints -}}
{{- fail "etcd.endpoints is set, but etcd.bundled is true: set etcd.bundled to false to use your own etcd" -}}
{{- else if .Values.etcd.bundled -}}
http://{{ include "tercet.fullname" . }}-etcd:2379
{{- else if .Values.etcd.endpoints -}}
{{- join "," .Values.etcd.endpoints -}}
{{- else -}}
{{- fail "etcd.bundled is false and etcd.endpoints is empty: list the URLs of your etcd in etcd.endpoints" -}}
{{- end -}}
{{- end -}}

{{/* How etcd is talked to: what the bundled one does not ask for must not be given. */}}
{{- define "tercet.etcdArgs" -}}
{{- $tls := .Values.etcd.tls -}}
{{- if and .Values.etcd.bundled (or $tls.secret .Values.etcd.auth.secret) -}}
{{- fail "etcd.tls.secret or etcd.auth.secret is set, but etcd.bundled is true: the bundled etcd has neither TLS nor users" -}}
{{- end -}}
{{- if and $tls.clientCertificate (not $tls.secret) -}}
{{- fail "etcd.tls.clientCertificate is true, but etcd.tls.secret is empty: name the secret that has the certificate" -}}
{{- end -}}
{{- if $tls.secret }}
- --etcd-ca=/etc/tercet/etcd-tls/ca.crt
{{- if $tls.clientCertificate }}
- --etcd-cert=/etc/tercet/etcd-tls/tls.crt
- --etcd-key=/etc/tercet/etcd-tls/tls.key
{{- end }}
{{- end }}
{{- with $tls.serverName }}
- --etcd-server-name={{ . }}
{{- end }}
{{- if .Values.etcd.auth.secret }}
- --etcd-password-file=/etc/tercet/etcd-auth/password
{{- end }}
{{- end -}}

{{- define "tercet.etcdEnv" -}}
{{- with .Values.etcd.auth.secret }}
- name: TERCET_ETCD_USER
  valueFrom:
    secretKeyRef:
      name: {{ . }}
      key: username
{{- end }}
{{- end -}}

{{- define "tercet.etcdMounts" -}}
{{- if .Values.etcd.tls.secret }}
- name: etcd-tls
  mountPath: /etc/tercet/etcd-tls
  readOnly: true
{{- end }}
{{- if .Values.etcd.auth.secret }}
- name: etcd-auth
  mountPath: /etc/tercet/etcd-auth
  readOnly: true
{{- end }}
{{- end -}}

{{- define "tercet.etcdVolumes" -}}
{{- with .Values.etcd.tls.secret }}
- name: etcd-tls
  secret:
    secretName: {{ . }}
    defaultMode: 0440
{{- end }}
{{- with .Values.etcd.auth.secret }}
- name: etcd-auth
  secret:
    secretName: {{ . }}
    defaultMode: 0440
    items:
      - key: password
        path: password
{{- end }}
{{- end -}}

{{/* What is equal in the spec of every pod; takes a dict of root, component and settings. */}}
{{- define "tercet.podSpec" -}}
serviceAccountName: {{ include "tercet.serviceAccountName" .root }}
automountServiceAccountToken: false
enableServiceLinks: false
{{- with .root.Values.image.pullSecrets }}
imagePullSecrets:
  {{- toYaml . | nindent 2 }}
{{- end }}
securityContext:
  runAsNonRoot: true
  runAsUser: 65532
  runAsGroup: 65532
  fsGroup: 65532
  seccompProfile:
    type: RuntimeDefault
{{- with .settings.nodeSelector }}
nodeSelector:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.tolerations }}
tolerations:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- with .settings.affinity }}
affinity:
  {{- toYaml . | nindent 2 }}
{{- end }}
{{- end -}}

{{- define "tercet.containerSecurity" -}}
allowPrivilegeEscalation: false
readOnlyRootFilesystem: true
capabilities:
  drop:
    - ALL
{{- end -}}
